/* Draws a response token by token with one of its numbers as colour. pipeline/pages.py puts this file into a page.

   heat(element, reading, name, span)
     reading  {pieces: [text], columns: {name: [number]}}
     name     which of the columns
     span     [low, high], the ends of the scale; symmetric where the sign means something
   Texts are set as text: whatever a model wrote stays text. Colours are those of tokens.py. */
"use strict";

const HEAT = { negative: [178, 24, 43], neutral: [255, 255, 255], positive: [33, 102, 172] };
const HEAT_HIDDEN = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

function heatColour(value, [low, high]) {
  const end = value > 0 ? high : -low;
  const share = Number.isFinite(value) && end > 0 ? Math.min(1, Math.abs(value) / end) : 0;
  const to = value > 0 ? HEAT.positive : HEAT.negative;
  return HEAT.neutral.map((from, i) => Math.round(from + share * (to[i] - from)));
}

function heatPrintable(text) {
  return text.replace(HEAT_HIDDEN, (one) =>
    one === "\n" ? "↵\n" : one === "\t" ? "⇥" : "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));
}

function heatNumber(value) {
  return value === null || value === undefined || Number.isNaN(value) ? "none" : String(Number(value.toPrecision(4)));
}

function heatScale(element, [low, high], unit) {
  element.className = "heat-scale";
  const colours = [low, low / 2, 0, high / 2, high].map((value) => `rgb(${heatColour(value, [low, high])})`);
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.background = `linear-gradient(to right, ${(high > 0 ? colours : colours.slice(0, 3)).join(", ")})`;
  const left = document.createElement("span"), right = document.createElement("span");
  left.textContent = heatNumber(low);
  right.textContent = `${heatNumber(high)} ${unit}`;
  element.replaceChildren(left, bar, right);
}

function heat(element, reading, name, span) {
  const values = reading.columns[name];
  const text = document.createElement("div"), told = document.createElement("div");
  text.className = "heat";
  told.className = "heat-told";
  told.setAttribute("aria-live", "polite");
  const tell = (index) => {
    const numbers = Object.entries(reading.columns).map(([column, all]) => `${column} ${heatNumber(all[index])}`);
    told.textContent = `token ${index}: ${heatPrintable(reading.pieces[index])}   ${numbers.join("   ")}`;
  };
  reading.pieces.forEach((piece, index) => {
    const token = document.createElement("span");
    const colour = heatColour(values[index], span);
    token.className = "token";
    token.textContent = heatPrintable(piece);
    token.style.backgroundColor = `rgb(${colour})`;
    if (colour[0] + colour[1] + colour[2] < 390) token.style.color = "#fff";
    token.dataset.index = index;
    text.append(token);
  });
  for (const event of ["pointerover", "click"]) {
    text.addEventListener(event, ({ target }) => target.dataset.index !== undefined && tell(Number(target.dataset.index)));
  }
  element.replaceChildren(text, told);
}
