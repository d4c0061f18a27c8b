"use strict";
const maps = JSON.parse(document.getElementById("maps").textContent);
const words = [...document.querySelectorAll(".word")];
const [heat, ramp] = ["heat", "ramp"].map((id) => document.getElementById(id));
const [line, peakLabel, slider, sliceName, chips] = ["line", "peak", "slice", "slicename", "overlays"].map((id) => document.getElementById(id));
const stage = document.querySelector(".stage");
for (const overlay of maps.overlays) {
  const text = atob(overlay.levels);
  overlay.bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}
let current = 0;
let held = null;
let shown = null;

function paint(canvas, width, height, levels) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  levels.forEach((level, place) => {
    for (let part = 0; part < 3; part += 1) image.data[4 * place + part] = maps.colours[3 * level + part];
    image.data[4 * place + 3] = 255;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function percent(value) {
  return `${Number((100 * value).toPrecision(2))} %`;
}

function draw() {
  const word = shown ?? held;
  stage.classList.toggle("lit", word !== null);
  words.forEach((other) => other.setAttribute("aria-pressed", String(other === held)));
  const overlay = maps.overlays[current];
  const slice = Number(slider.value);
  sliceName.textContent = overlay.slices[slice];
  if (word === null) {
    line.textContent = "";
    peakLabel.textContent = "";
    return;
  }
  const row = Number(word.dataset.row);
  const [high, wide] = overlay.grid;
  const start = (row * overlay.slices.length + slice) * high * wide;
  paint(heat, wide, high, overlay.bytes.subarray(start, start + high * wide));
  heat.dataset.row = word.dataset.row;
  const peak = overlay.peak[row][slice];
  peakLabel.textContent = overlay.share ? `${percent(peak)} ${overlay.unit}` : `${peak} (${overlay.unit})`;
  const share = overlay.total ? `: ${percent(overlay.total[row][slice])} ${overlay.unit} is on the picture` : "";
  line.textContent = `“${word.textContent}”, ${overlay.name}, ${overlay.slices[slice]}${share}${word.dataset.note ? `; ${word.dataset.note}` : ""}`;
}

function choose(number) {
  current = number;
  slider.max = maps.overlays[number].slices.length - 1;
  if (Number(slider.value) > Number(slider.max)) slider.value = 0;
  slider.disabled = slider.max === "0";
  draw();
}

function focusOn(place) {
  const next = words[Math.max(0, Math.min(words.length - 1, place))];
  words.forEach((word) => word.setAttribute("tabindex", word === next ? "0" : "-1"));
  next.focus();
}

words.forEach((word, place) => {
  word.addEventListener("mouseenter", () => { shown = word; draw(); });
  word.addEventListener("mouseleave", () => { shown = null; draw(); });
  word.addEventListener("focus", () => { shown = word; draw(); });
  word.addEventListener("blur", () => { shown = null; draw(); });
  word.addEventListener("click", () => { held = held === word ? null : word; draw(); });
  word.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: place + 1, ArrowLeft: place - 1, ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: words.length - 1 };
    if (event.key in moves) focusOn(moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") held = held === word ? null : word;
    else if (event.key === "Escape") { held = null; shown = null; }
    else return;
    event.preventDefault();
    draw();
  });
});
maps.overlays.forEach((overlay, number) => {
  const chip = document.createElement("label");
  chip.className = "chip";
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "overlay", checked: number === 0 });
  input.addEventListener("change", () => choose(number));
  const name = document.createElement("span");
  name.textContent = overlay.name;
  chip.append(input, name);
  chips.append(chip);
});
slider.addEventListener("input", draw);
paint(ramp, 256, 1, Uint8Array.from({ length: 256 }, (_, level) => level));
choose(0);
document.getElementById("board").dataset.ready = "";
