// Asks the server every two seconds whether the run went on, and if so puts the new page in the place of the old one. What is
// unfolded stays unfolded, and the window stays where it is.
"use strict";

function inWords(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

async function look() {
  try {
    const state = await (await fetch("/state.json")).json();
    if (state.version !== document.querySelector("main").dataset.version) await replacePage();
    document.getElementById("age").textContent = state.age === null ? "" : `last record ${inWords(state.age)} ago`;
  } catch {
    document.getElementById("age").textContent = "the server of this page does not answer; this is what it said last";
  }
}

async function replacePage() {
  const text = await (await fetch("/")).text();
  const page = new DOMParser().parseFromString(text, "text/html");
  const open = [...document.querySelectorAll("details[open]")].map((details) => details.closest("section").id);
  document.head.querySelector("style")?.remove();
  document.head.append(...page.head.querySelectorAll("style"));
  document.querySelector("main").replaceWith(page.querySelector("main"));
  for (const id of open) document.querySelector(`#${id} details`)?.setAttribute("open", "");
}

look();
setInterval(look, 2000);
