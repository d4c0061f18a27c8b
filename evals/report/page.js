"use strict";
/* What the scripts of the results page share, and the buttons that save its tables. */
const byId = (id) => document.getElementById(id);
const data = (id) => JSON.parse(byId(id).textContent);

function make(tag, options = {}, ...children) {
  const { dataset, attributes, ...own } = options;
  const node = Object.assign(document.createElement(tag), own);
  Object.assign(node.dataset, dataset);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function saveTables() {
  const tables = data("exports");
  for (const bar of document.querySelectorAll(".export")) bar.hidden = false;
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-save]");
    if (!button) return;
    const { save, kind } = button.dataset;
    const type = kind === "csv" ? "text/csv" : "text/markdown";
    const url = URL.createObjectURL(new Blob([tables[save][kind]], { type: `${type};charset=utf-8` }));
    make("a", { href: url, download: `${tables[save].name}.${kind === "csv" ? "csv" : "md"}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  let closed = []; // what is folded up would not be printed
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
}

saveTables();
