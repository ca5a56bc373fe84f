// Keeps the page fresh: what changed is replaced; what a person opened, scrolled to or selected stays.
"use strict";
const SECONDS = 5;
const PARTS = "body > header, body > nav, main > section";
const name = (part) => part.id || part.tagName;
let shown = new Map([...document.querySelectorAll(PARTS)].map((part) => [name(part), part.outerHTML]));
let stamp = document.documentElement.dataset.stamp;

// Folds and scrolled boxes of a part, by what they belong to, as a new one may come before them.
function places(part) {
  const counts = new Map(), found = new Map();
  for (const element of part.querySelectorAll("details, .scroll, .text, pre")) {
    const owner = element.closest("[data-key]"), kind = element.tagName + element.className;
    const key = JSON.stringify([owner && part.contains(owner) ? owner.dataset.key : "", kind]);
    const count = counts.get(key) || 0;
    counts.set(key, count + 1);
    found.set(key + count, element);
  }
  return found;
}

function swap(old, part) {
  // Read first: an element that is taken out of the page is not scrolled any more.
  const was = [...places(old)].map(([key, e]) => [key, e.open, e.scrollLeft, e.scrollTop]);
  old.replaceWith(part);
  const fresh = places(part);
  for (const [key, open, left, top] of was) {
    const now = fresh.get(key);
    if (!now) continue;
    if (now.tagName === "DETAILS") now.open = open;
    if (left || top) now.scrollTo({ left, top, behavior: "instant" });
  }
}

// Someone who marks text to copy it must not lose it: that part waits for the next round.
function inUse(part) {
  const selection = getSelection();
  return !selection.isCollapsed && selection.containsNode(part, true);
}

function replace(fresh) {
  // What is in view stays in view; at the very top the page simply grows downwards.
  const inView = (part) => part.getBoundingClientRect().bottom > 0;
  const anchor = scrollY > 0 && [...document.querySelectorAll("main > section")].find(inView);
  const id = anchor && anchor.id, top = anchor && anchor.getBoundingClientRect().top;
  const parts = [...fresh.querySelectorAll(PARTS)];
  const wanted = new Map(parts.map((part) => [name(part), part.outerHTML]));
  let before = document.querySelector("body > nav"), waits = false;
  for (const part of document.querySelectorAll("main > section")) if (!wanted.has(part.id)) part.remove();
  for (const part of parts) {
    const key = name(part);
    const old = part.id ? document.getElementById(part.id) : document.querySelector("body > " + part.tagName);
    if (!old) {
      const main = document.querySelector("main");
      if (before.parentElement === main) before.after(part); else main.prepend(part);
      before = part;
    } else if (shown.get(key) === wanted.get(key)) {
      before = old;
    } else if (inUse(old)) {
      wanted.set(key, shown.get(key));
      waits = true;
      before = old;
    } else {
      swap(old, part);
      before = part;
    }
  }
  shown = wanted;
  document.title = fresh.title;
  stamp = waits ? "" : fresh.documentElement.dataset.stamp;
  const now = id && document.getElementById(id);
  if (now) scrollBy({ top: now.getBoundingClientRect().top - top, behavior: "instant" });
}

async function look() {
  let state = "live";
  try {
    const latest = await (await fetch("stamp")).text();
    if (latest !== stamp) {
      const page = await fetch(".");
      if (!page.ok) throw new Error(page.statusText);
      replace(new DOMParser().parseFromString(await page.text(), "text/html"));
    }
  } catch (error) {
    state = "no answer: is `rlcs report --live` still running?";
  }
  const pulse = document.getElementById("pulse");
  if (pulse && pulse.textContent !== state) pulse.textContent = state;
  setTimeout(look, SECONDS * 1000);
}
look();
