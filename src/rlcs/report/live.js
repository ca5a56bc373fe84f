// Keeps the page fresh: what changed is replaced, what a person opened or scrolled to stays.
"use strict";
const SECONDS = 5;
const PARTS = "body > header, body > nav, main > section";
const name = (part) => part.id || part.tagName;
let shown = new Map([...document.querySelectorAll(PARTS)].map((part) => [name(part), part.outerHTML]));
let stamp = document.documentElement.dataset.stamp;

function replace(fresh) {
  const anchor = [...document.querySelectorAll("main > section")].find((part) => part.getBoundingClientRect().bottom > 0);
  const id = anchor && anchor.id, top = anchor && anchor.getBoundingClientRect().top;
  const parts = [...fresh.querySelectorAll(PARTS)];
  const wanted = new Map(parts.map((part) => [name(part), part.outerHTML]));
  let before = document.querySelector("body > nav");
  for (const part of document.querySelectorAll("main > section")) if (!wanted.has(part.id)) part.remove();
  for (const part of parts) {
    const html = wanted.get(name(part));
    const old = part.id ? document.getElementById(part.id) : document.querySelector("body > " + part.tagName);
    if (!old) {
      const main = document.querySelector("main");
      if (before.parentElement === main) before.after(part); else main.prepend(part);
      before = part;
    } else if (shown.get(name(part)) !== html) {
      const open = [...old.querySelectorAll("details")].map((fold) => fold.open);
      old.replaceWith(part);
      [...part.querySelectorAll("details")].forEach((fold, index) => { if (index in open) fold.open = open[index]; });
      before = part;
    } else before = old;
  }
  shown = wanted;
  document.title = fresh.title;
  stamp = fresh.documentElement.dataset.stamp;
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
