// Numbers and words of the route view.
"use strict";

function byId(id) { return document.getElementById(id); }

function order(values) {  // by falling frequency, ties to the lower index
  return values.map((_, index) => index).sort((a, b) => values[b] - values[a] || a - b);
}

function kept(width, count) {  // as Python rounds: halves to the even number
  const exact = width * count, low = Math.floor(exact);
  const rounded = exact - low === 0.5 ? low + (low % 2) : Math.round(exact);
  return Math.max(1, rounded);
}

function percent(value, digits) { return `${(100 * value).toFixed(digits === undefined ? 1 : digits)} %`; }

function short(name) { return name.length > 15 ? `…${name.slice(-14)}` : name; }

function same(a, b) { return a && b && a.layer === b.layer && a.channel === b.channel; }

function line(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
