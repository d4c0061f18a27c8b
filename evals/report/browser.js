"use strict";
/* Browses the items of the results page; `page.js` comes before. Nothing is fetched: all data lies in the page. */
(() => {
  const ROW = 48; // pixels, as in the style sheet: 3rem
  const SHOWS = ["all", "fixed", "broke", "differ", "wrong"];
  // ---------------------------------------------------------------------------------------- pictures
  const index = data("image-index");
  const chunks = new Map();

  function picture(run, image) {
    const number = index.pictures[run][image];
    if (number < 0) return null;
    const shown = document.querySelector(`img[data-picture="${number}"]`);
    if (shown) return shown.src;
    const chunk = Math.floor(number / index.chunk);
    if (!chunks.has(chunk)) chunks.set(chunk, data(`pictures-${chunk}`));
    return chunks.get(chunk)[number % index.chunk];
  }

  // ------------------------------------------------------------------------------------------- state
  const sets = new Map();
  const state = { set: byId("set").value, recipe: "", show: "", query: "", facets: {}, item: "" };
  let head, rows, texts; // of the set that is shown
  let hits = []; // places in rows
  let at = -1; // place in hits

  function openSet(key) {
    if (!sets.has(key)) {
      const { head, rows } = data(`items-${key}`);
      sets.set(key, { head, rows, texts: [] });
    }
    ({ head, rows, texts } = sets.get(key));
    state.set = key;
  }

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const known = given.has("set") && [...byId("set").options].some((o) => o.value === given.get("set"));
    openSet(known ? given.get("set") : state.set);
    const labels = head.recipes.slice(1).map(([label]) => label);
    state.recipe = labels.includes(given.get("recipe")) ? given.get("recipe") : "";
    state.show = SHOWS.includes(given.get("show")) ? given.get("show") : "";
    state.query = given.get("q") || "";
    state.item = given.get("item") || "";
    state.facets = {};
    for (const name of Object.keys(head.facets)) {
      if (given.has(`f.${name}`)) state.facets[name] = given.get(`f.${name}`);
    }
  }

  function writeHash() {
    const parts = new URLSearchParams({ set: state.set, show: state.show });
    if (state.recipe) parts.set("recipe", state.recipe);
    if (state.query) parts.set("q", state.query);
    for (const [name, value] of Object.entries(state.facets)) parts.set(`f.${name}`, value);
    if (state.item) parts.set("item", state.item);
    history.replaceState(null, "", `#${parts}`);
  }

  // ----------------------------------------------------------------------------------------- filters
  /* An item is [id, image, question, truth, facets, answers], an answer [right, differs, text, marks, cut];
     the first answer is the baseline's. */
  function passes(show, item, others) {
    const answers = item[5];
    const right = answers[0][0];
    const some = (test) => others.some((place) => test(answers[place]));
    if (show === "all") return true;
    if (show === "fixed") return !right && some((answer) => answer[0]);
    if (show === "broke") return Boolean(right) && some((answer) => !answer[0]);
    if (show === "differ") return some((answer) => answer[1]);
    return !right && others.every((place) => !answers[place][0]);
  }

  function chosen() {
    const places = head.recipes.map((_, place) => place).slice(1);
    return state.recipe ? places.filter((place) => head.recipes[place][0] === state.recipe) : places;
  }

  function searched(place) {
    texts[place] ??= rows[place]
      .slice(2, 4)
      .concat(rows[place][0], index.names[head.run][rows[place][1]], rows[place][5].map((answer) => answer[2]))
      .join("\n")
      .toLowerCase();
    return texts[place];
  }

  function filter() {
    const others = chosen();
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = Object.entries(head.facets)
      .map(([name, values], place) => [place, values.indexOf(state.facets[name])])
      .filter(([, value]) => value >= 0);
    const found = Object.fromEntries(SHOWS.map((show) => [show, []]));
    rows.forEach((item, place) => {
      if (!wanted.every(([facet, value]) => item[4][facet] === value)) return;
      if (words.length && !words.every((word) => searched(place).includes(word))) return;
      for (const show of SHOWS) {
        if (passes(show, item, others)) found[show].push(place);
      }
    });
    state.show ||= found.differ.length ? "differ" : "all";
    hits = found[state.show];
    return Object.fromEntries(SHOWS.map((show) => [show, found[show].length]));
  }

  // ---------------------------------------------------------------------------------------- controls
  function fillControls() {
    byId("set").value = state.set;
    const others = head.recipes.slice(1);
    const recipe = byId("recipe");
    const any = others.length > 1 ? [make("option", { value: "", textContent: "any" })] : [];
    recipe.replaceChildren(...any, ...others.map(([label]) => make("option", { value: label, textContent: label })));
    recipe.value = state.recipe || recipe.options[0]?.value || "";
    recipe.parentNode.hidden = !others.length;
    byId("query").value = state.query;
    byId("facets").replaceChildren(
      ...Object.entries(head.facets).map(([name, values]) => {
        const options = values.map((value) => make("option", { value, textContent: value || "(none)" }));
        const select = make("select", { name }, make("option", { value: "\u0000", textContent: "all" }), ...options);
        select.value = state.facets[name] ?? "\u0000";
        return make("label", { className: "field" }, name, select);
      }),
    );
  }

  function fillShows(counts) {
    const [good, bad] = head.became;
    const single = state.recipe || head.recipes.length === 2;
    const words = {
      all: ["all", ""],
      fixed: [single ? "recipe fixed it" : "a recipe fixed it", good],
      broke: [single ? "recipe broke it" : "a recipe broke it", bad],
      differ: ["differ", "another verdict, or other objects that are not there"],
      wrong: [single ? "both wrong" : "all wrong", `none and ${single ? "the recipe" : "all recipes"}: ${head.verdicts[1]}`],
    };
    if (head.recipes.length === 1) words.wrong = [head.verdicts[1], ""];
    const shown = head.recipes.length === 1 ? ["all", "wrong"] : SHOWS;
    const box = byId("show");
    if ([...box.querySelectorAll("input")].map((input) => input.value).join() !== shown.join()) {
      box.replaceChildren(
        box.firstElementChild,
        ...shown.map((show) =>
          make("label", { className: "chip" }, make("input", { type: "radio", name: "show", value: show }), make("span")),
        ),
      );
    }
    for (const input of box.querySelectorAll("input")) {
      input.checked = input.value === state.show;
      input.nextSibling.textContent = `${words[input.value][0]} (${counts[input.value].toLocaleString("en")})`;
      input.parentNode.title = words[input.value][1];
    }
  }

  /* Filter afresh; the item that is shown stays where it passes, else the first is shown. */
  function update() {
    const counts = filter();
    fillShows(counts);
    const kept = hits.findIndex((place) => rows[place][0] === state.item);
    at = kept >= 0 ? kept : hits.length ? 0 : -1;
    byId("count").textContent =
      `${hits.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${head.units}`;
    byId("sizer").style.height = `${hits.length * ROW}px`;
    byId("list").scrollTop = Math.max(0, at * ROW - ROW);
    drawn = "";
    showItem();
  }

  // -------------------------------------------------------------------------------------------- list
  let drawn = ""; // which rows are in the page: only those in sight and a few more

  function drawRows() {
    const list = byId("list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(hits.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
    if (drawn === `${first}-${last}-${at}`) return;
    drawn = `${first}-${last}-${at}`;
    const some = [];
    for (let place = first; place < last; place += 1) some.push(row(place));
    byId("sizer").replaceChildren(...some);
    if (at >= first && at < last) list.setAttribute("aria-activedescendant", `item-${at}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function row(place) {
    const [id, image, question, , , answers] = rows[hits[place]];
    const words = head.recipes.map(([label], n) => `${label} ${head.verdicts[answers[n][0] ? 0 : 1]}`);
    const sides = make("span", { className: "sides" });
    head.recipes.forEach(([label], n) => {
      const right = answers[n][0];
      sides.append(make("b", { className: right ? "better" : "worse", textContent: right ? "✓" : "✗" }), ` ${label}  `);
    });
    const text = question || index.names[head.run][image];
    return make(
      "div",
      {
        className: "row",
        id: `item-${place}`,
        attributes: {
          role: "option",
          "aria-selected": String(place === at),
          "aria-posinset": place + 1,
          "aria-setsize": hits.length,
          "aria-label": `${text}: ${words.join(", ")}`,
          style: `top: ${place * ROW}px`,
        },
        dataset: { place, item: id },
      },
      make("span", { textContent: text }),
      sides,
    );
  }

  function select(place) {
    if (!hits.length) return;
    at = Math.min(hits.length - 1, Math.max(0, place));
    const list = byId("list");
    const top = at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    showItem();
    writeHash();
  }

  // ------------------------------------------------------------------------------------------ detail
  function showItem() {
    state.item = at >= 0 ? rows[hits[at]][0] : "";
    drawRows();
    const detail = byId("detail");
    if (at < 0) {
      detail.replaceChildren(make("p", { textContent: "No item is like that. Take another filter or other words." }));
      return;
    }
    const [id, image, question, truth, facets, answers] = rows[hits[at]];
    const name = index.names[head.run][image];
    const facts = [["true", truth || "–"], ["image", name]];
    if (id !== name) facts.push(["item", id]);
    if (!question) facts.push(["prompt", head.prompt]);
    Object.entries(head.facets).forEach(([fact, values], n) => facts.push([fact, values[facets[n]]]));
    const list = make("dl", { className: "facts" });
    for (const [fact, value] of facts) {
      if (fact === "label" && value === truth) continue;
      list.append(make("dt", { textContent: fact }), make("dd", { textContent: value }));
    }
    const uri = picture(head.run, image);
    const seen = uri
      ? make("img", { src: uri, alt: `Image ${name}` })
      : make("div", { className: "missing", textContent: `${name}: no picture on this page` });
    const asked = make("p", { className: "question", textContent: question, hidden: !question });
    const said = make("div", { className: "said" }, ...head.recipes.map((recipe, n) => answer(recipe, answers[n])));
    detail.replaceChildren(bar(), make("div", { className: "top" }, seen, make("div", {}, asked, list)), said);
  }

  function bar() {
    const step = (by, text) =>
      make("button", { type: "button", textContent: text, dataset: { step: by }, disabled: hits[at + by] === undefined });
    const place = make("small", { textContent: `${(at + 1).toLocaleString("en")} of ${hits.length.toLocaleString("en")}` });
    return make("div", { className: "bar" }, step(-1, "← previous"), place, step(1, "next →"));
  }

  function answer([label, colour, symbol], [right, , text, marks = [], cut = 0]) {
    const verdict = `${right ? "✓" : "✗"} ${head.verdicts[right ? 0 : 1]}`;
    const title = make(
      "h4",
      {},
      make("span", { className: `c${colour}`, textContent: symbol, attributes: { "aria-hidden": "true" } }),
      ` ${label} `,
      make("small", { className: `judged ${right ? "better" : "worse"}`, textContent: verdict }),
    );
    const box = make("div", {}, title, make("p", {}, ...marked(text, marks)));
    const absent = [...new Set(marks.filter((mark) => !mark[2]).map((mark) => mark[3]))];
    if (absent.length) box.append(make("p", { className: "absent", textContent: `not in the image: ${absent.join(", ")}` }));
    if (cut) box.append(make("small", { textContent: "cut by the token limit" }));
    return box;
  }

  /* Marks count code points, as Python does. */
  function marked(text, marks) {
    if (!text) return [make("small", { textContent: "(empty)" })];
    const letters = Array.from(text);
    const parts = [];
    let place = 0;
    for (const [start, end, right, thing] of [...marks].sort((a, b) => a[0] - b[0])) {
      if (start < place) continue;
      parts.push(letters.slice(place, start).join(""));
      const title = `${thing}: ${right ? "in the image" : "not in the image"}`;
      parts.push(make("mark", { className: right ? "right" : "wrong", title, textContent: letters.slice(start, end).join("") }));
      place = end;
    }
    return [...parts, letters.slice(place).join("")];
  }

  // ---------------------------------------------------------------------------------------- keyboard
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const { target, key } = event;
    const inside = target === document.body || byId("browser").contains(target);
    if (target.id === "query") {
      if (key === "Escape" || key === "Enter") focusList(event);
      return;
    }
    if (!inside || target.tagName === "SELECT") return;
    if (key === "j") move(event, at + 1);
    else if (key === "k") move(event, at - 1);
    else if (key === "/") {
      byId("query").focus();
      byId("query").select();
      event.preventDefault();
    } else if (key === "Escape") focusList(event);
    else if (target === byId("list") || byId("detail").contains(target)) arrow(event);
  }

  function arrow(event) {
    const page = Math.max(1, Math.floor(byId("list").clientHeight / ROW) - 1);
    const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
    if (event.key in steps) move(event, at + steps[event.key]);
    else if (event.target !== byId("list")) return;
    else if (event.key === "PageDown") move(event, at + page);
    else if (event.key === "PageUp") move(event, at - page);
    else if (event.key === "Home") move(event, 0);
    else if (event.key === "End") move(event, hits.length - 1);
  }

  function move(event, place) {
    event.preventDefault();
    const back = byId("detail").contains(event.target) && event.target.dataset.step;
    select(place);
    if (event.target === document.body) byId("browser").scrollIntoView({ block: "nearest" });
    if (back) focusStep(back);
  }

  function focusStep(step) {
    const button = byId("detail").querySelector(`button[data-step="${step}"]`);
    (button && !button.disabled ? button : byId("detail")).focus({ preventScroll: true });
  }

  function focusList(event) {
    event.preventDefault();
    byId("list").focus({ preventScroll: true });
  }

  // ------------------------------------------------------------------------------------------- start
  function listen() {
    let waiting = 0;
    const changed = () => { update(); writeHash(); };
    byId("set").addEventListener("change", (event) => {
      openSet(event.target.value);
      Object.assign(state, { recipe: "", show: "", query: "", facets: {}, item: "" });
      fillControls();
      changed();
    });
    byId("recipe").addEventListener("change", (event) => { state.recipe = event.target.value; changed(); });
    byId("show").addEventListener("change", (event) => { state.show = event.target.value; changed(); });
    byId("facets").addEventListener("change", (event) => {
      if (event.target.value === "\u0000") delete state.facets[event.target.name];
      else state.facets[event.target.name] = event.target.value;
      changed();
    });
    byId("query").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state.query = event.target.value; changed(); }, 120);
    });
    byId("tools").addEventListener("submit", (event) => event.preventDefault());
    byId("list").addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
    byId("list").addEventListener("click", (event) => {
      const line = event.target.closest(".row");
      if (line) select(Number(line.dataset.place));
    });
    byId("detail").addEventListener("click", (event) => {
      const { step } = event.target.dataset;
      if (!step) return;
      select(at + Number(step));
      focusStep(step);
    });
    document.addEventListener("keydown", onKey);
    addEventListener("resize", () => requestAnimationFrame(drawRows));
    addEventListener("hashchange", () => {
      if (location.hash.includes("=")) start();
    });
  }

  function start() {
    readHash();
    fillControls();
    update();
  }

  byId("browser").hidden = false;
  byId("examples").hidden = true;
  listen();
  start();
  byId("browser").dataset.ready = "true";
})();
