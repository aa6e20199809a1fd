// Numbers, words and elements of the route views.
"use strict";

function order(values) {  // by falling value, ties to the lower index
  return values.map((_, index) => index).sort((a, b) => values[b] - values[a] || a - b);
}

function kept(width, count) {  // as Python rounds: halves to the even number
  const exact = width * count, low = Math.floor(exact);
  const rounded = exact - low === 0.5 ? low + (low % 2) : Math.round(exact);
  return Math.max(1, rounded);
}

function percent(value, digits) { return `${(100 * value).toFixed(digits === undefined ? 1 : digits)} %`; }

function brief(value) {  // three digits
  return value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 10000 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
}

function short(name) { return name.length > 15 ? `…${name.slice(-14)}` : name; }

function breakable(name) { return name.replace(/[:,=]/g, "$&\u200b"); }  // a long name may go on in the next line there

function same(a, b) { return a && b && a.layer === b.layer && a.channel === b.channel; }

function html(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  return made;
}

const SPACE = (() => {  // of the elements of a drawing
  const made = document.createElement("template");
  made.innerHTML = "<svg></svg>";
  return made.content.firstChild.namespaceURI;
})();

function drawn(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
