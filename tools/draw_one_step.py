"""Draws docs/figures/one_step.svg, the project in one picture: `python tools/draw_one_step.py > docs/figures/one_step.svg`.

A step with a teacher of 8 layers in 2 stages and a student of 6 layers in 3 stages, on ranks of their own. The arrows between
them are Eq. 11's map for these depths. The file has its own background and colours for light and dark pages.
"""

from __future__ import annotations

TEACHER_LAYERS, TEACHER_STAGES = 8, 2
STUDENT_LAYERS, STUDENT_STAGES = 6, 3
LEFT, RIGHT = 250, 940
TEACHER_TOP, STUDENT_TOP = 60, 300
PANEL_HEIGHT, BAR_HEIGHT = 128, 52
TEACHER_BARS, STUDENT_BARS = TEACHER_TOP + 62, STUDENT_TOP + 44

STYLE = """
  svg { font: 14px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif }
  .page { fill: #ffffff } text { fill: #1f2933 }
  .small { font-size: 12px; fill: #52606d } .title { font-weight: 600; font-size: 15px }
  .panel { fill: #f3f6fa; stroke: #b8c4d0 } .stage { fill: #ffffff; stroke: #b8c4d0; stroke-dasharray: 4 3 }
  .teacher { fill: #3f7cac } .student { fill: #e08d3c } .loss { fill: #c0392b }
  .bar { fill: #ffffff; font-size: 12px; font-weight: 600 }
  .arrow { stroke: #52606d; stroke-width: 1.6; fill: none; marker-end: url(#head) } .head { fill: #52606d }
  .states { stroke: #3f7cac; stroke-width: 1.8; fill: none; marker-end: url(#states) } .states-head { fill: #3f7cac }
  @media (prefers-color-scheme: dark) {
    .page { fill: #14181d } text { fill: #e4e9ef } .small { fill: #a3b0bd } .panel { fill: #1d242c; stroke: #465360 }
    .stage { fill: #14181d; stroke: #465360 } .arrow { stroke: #a3b0bd } .head { fill: #a3b0bd } .bar { fill: #ffffff }
    .states { stroke: #6fb1e4 } .states-head { fill: #6fb1e4 }
  }
"""


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle with round corners."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def arrow(path: str, kind: str = "arrow") -> str:
    """A line that ends in a head."""
    return f'<path class="{kind}" d="{path}"/>'


def centres(layers: int, stages: int) -> list[float]:
    """x of each layer's bar."""
    width, per_stage = (RIGHT - LEFT - 20) / stages, layers // stages
    return [
        LEFT + 10 + stage * width + (number + 0.5) * width / per_stage
        for stage in range(stages)
        for number in range(per_stage)
    ]


def panel(
    top: float, title: str, layers: int, stages: int, tp: int, first_rank: int, title_x: float, label: float
) -> list[str]:
    """One model's frame and stages; where the title begins, and the height at which stages are named."""
    lines = [box(LEFT, top, RIGHT - LEFT, PANEL_HEIGHT, "panel"), text(title_x, top + 22, title, "title", "start")]
    width = (RIGHT - LEFT - 20) / stages
    for stage in range(stages):
        first = first_rank + stage * tp
        x = LEFT + 10 + stage * width
        lines.append(box(x + 3, top + 32, width - 6, PANEL_HEIGHT - 40, "stage"))
        lines.append(text(x + width / 2, label, f"stage {stage}: ranks {first}-{first + tp - 1}, tp {tp}", "small"))
    return lines


def bars(xs: list[float], top: float, kind: str) -> list[str]:
    """A numbered bar for each layer."""
    return [
        line
        for number, x in enumerate(xs, start=1)
        for line in (box(x - 15, top, 30, BAR_HEIGHT, kind), text(x, top + 31, str(number), "bar"))
    ]


def picture() -> str:
    """The whole file."""
    teacher, student = centres(TEACHER_LAYERS, TEACHER_STAGES), centres(STUDENT_LAYERS, STUDENT_STAGES)
    lines = panel(
        TEACHER_TOP, "teacher, frozen, forward only", TEACHER_LAYERS, TEACHER_STAGES, 4, 0, LEFT + 14, TEACHER_TOP + 50
    )
    lines += panel(STUDENT_TOP, "student", STUDENT_LAYERS, STUDENT_STAGES, 2, 8, LEFT + 78, STUDENT_TOP + 113)
    lines += bars(teacher, TEACHER_BARS, "teacher") + bars(student, STUDENT_BARS, "student")
    for number, x in enumerate(student):
        source = teacher[round(number / (STUDENT_LAYERS - 1) * (TEACHER_LAYERS - 1))]
        top, bottom = TEACHER_BARS + BAR_HEIGHT, STUDENT_BARS - 9
        lines.append(arrow(f"M{source:g} {top} C{source:g} {top + 70} {x:g} {bottom - 90} {x:g} {bottom}", "states"))
        lines.append(f'<circle class="loss" cx="{x:g}" cy="{STUDENT_BARS}" r="7"/>')
    middle = (LEFT + RIGHT) / 2
    lines += [
        box(middle - 217, 213, 434, 52, "panel"),
        text(middle, 235, "hidden states of the supervised tokens travel, each once"),
        text(middle, 254, "through a bridge where widths differ; by bytes where tokenizers do", "small"),
        box(20, 60, 150, 44, "panel"), text(95, 87, "prompts"),
        box(20, 200, 150, 92, "panel"), text(95, 226, "rollouts", "title"),
        text(95, 247, "the student writes,", "small"), text(95, 264, "with weights v", "small"),
        text(95, 281, "(transformers, vLLM)", "small"),
        arrow("M95 104 V196"),
        arrow(f"M170 230 H200 C225 230 210 124 {LEFT - 6} 124"), text(186, 221, "text", "small"),
        arrow(f"M170 262 H200 C225 262 210 364 {LEFT - 6} 364"), text(186, 280, "text", "small"),
        box(middle - 150, 462, 300, 44, "panel"), text(middle, 489, "AdamW, then weights v + 1"),
        arrow(f"M{middle:g} {STUDENT_TOP + PANEL_HEIGHT} V458"),
        arrow(f"M{middle - 150:g} 484 H95 V296"),
        text(270, 476, "to the engine, then a probe:", "small"), 
        text(270, 500, "does the engine compute what the trainer does?", "small"),
        '<circle class="loss" cx="766" cy="480" r="7"/>', text(780, 484, "loss, where the layer lives", "small", "start"),
        text(LEFT, 36, "One step. Both models are sharded by megatron-core, each in its own layout", "", "start"),
    ]  # fmt: skip
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path class="{kind}" d="M0 0 L10 5 L0 10 z"/></marker>'
        for name, kind in (("head", "head"), ("states", "states-head"))
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 530" role="img" aria-label="One step of training">\n'
        f'<style>{STYLE}</style>\n<defs>{heads}</defs>\n<rect class="page" width="960" height="530" rx="10"/>\n{body}\n</svg>'
    )


if __name__ == "__main__":
    print(picture())
