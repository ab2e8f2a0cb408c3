"""The parts of `tools/bench_update.py`, which says what is measured and how.

Modules import each other relatively, as the command finds this package as `update_bench` and tests find it as
`tools.update_bench`. What the command imports at its start (case, run, report) leaves torch alone until it is needed.
"""
