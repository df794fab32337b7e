"use strict";
// The page is static; this draws a chart when it comes near the screen, and lists and opens trajectories.
// Everything from a run (messages, questions, names) goes into the page as text, never as HTML.

const json = (id) => JSON.parse(document.getElementById(id).textContent);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

// base64 of gzip of UTF-8 JSON, as written by html.py
async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent.trim());
  const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// ------------------------------------------------------------------------------------------------------ charts

const LOOK = {
  margin: { l: 58, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: "system-ui, sans-serif", size: 12, color: "#1f2430" }, hovermode: "x unified", showlegend: true,
  legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, maxheight: 0.35 },
};
const AXIS = { gridcolor: "#e6e8ec", zerolinecolor: "#d0d4da", automargin: true };
const touch = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page, it does not zoom a chart

function draw(node, figure) {
  const { xaxis, yaxis, ...layout } = figure.layout;
  const small = node.clientHeight < 240;
  const look = { ...LOOK, showlegend: figure.data.length > 1 && !(small && figure.data.length > 4) };
  const axes = { xaxis: { ...AXIS, ...xaxis }, yaxis: { ...AXIS, ...yaxis } };
  if (touch) look.dragmode = false;
  return Plotly.newPlot(node, figure.data, { ...look, ...layout, ...axes }, {
    responsive: true, displayModeBar: false,
  });
}

const figures = json("figures");
const near = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    near.unobserve(entry.target);
    draw(entry.target, figures[Number(entry.target.dataset.figure)]);
  }
}, { rootMargin: "500px" });
document.querySelectorAll(".plot").forEach((node) => near.observe(node));

// ------------------------------------------------------------------------------------------------ trajectories

const PAGE = 60; // rows added to the list at a time
const KEPT = 6; // unpacked steps kept in memory
const list = document.getElementById("list");
const browser = { runs: [], rows: [], found: null, shown: [], end: 0, current: -1, tab: "dialogue", search: 0, opened: 0 };
const cache = new Map();

async function step(run, number) {
  const id = `step-${run}-${number}`;
  if (!cache.has(id)) cache.set(id, unpack(id));
  const value = cache.get(id);
  cache.delete(id); // most recently used last
  cache.set(id, value);
  while (cache.size > KEPT) cache.delete(cache.keys().next().value);
  return value;
}

const chip = (text, kind = "") => make("span", { class: `chip ${kind}` }, text);
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(digits)).toString();
}
const signed = (value) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value));
const kind = (value) => (value > 0 ? "good" : value < 0 ? "bad" : "");

// A row of the index: [step, place in the step, acc, reward, stop reason, flags, picked, tokens, question]
function listRow(i) {
  const [at, , acc, reward, stop, flags, picked, tokens, question] = browser.shown[i];
  const why = picked.filter((p) => p !== "sampled");
  const row = make("button", { class: "row", type: "button", "data-i": i },
    make("span", { class: "first" },
      make("span", { class: acc ? "dot right" : "dot", title: acc ? "right" : "wrong" }),
      `step ${at}`, make("span", { class: "soft" }, `${stop} · ${tokens} tokens`), chip(signed(reward), kind(reward))),
    make("span", { class: "question" }, question || "(no question)"),
    make("span", {}, ...[...why.map((w) => chip(w)), ...flags.filter((f) => f !== "wrong").map((f) => chip(f, "bad"))]));
  if (i === browser.current) row.setAttribute("aria-current", "true");
  return row;
}

function more() {
  const end = Math.min(browser.end + PAGE, browser.shown.length);
  const fresh = [];
  for (; browser.end < end; browser.end++) fresh.push(listRow(browser.end));
  list.append(...fresh);
}

const value = (id) => document.getElementById(id).value;
const pressed = () => [...document.querySelectorAll("#flags button[aria-pressed=true]")].map((b) => b.dataset.flag);

function apply() {
  const [from, to] = [value("from"), value("to")].map((v) => (v === "" ? null : Number(v)));
  const stop = value("stop"), flags = pressed(), found = browser.found;
  browser.shown = browser.rows.filter((r) =>
    (from === null || r[0] >= from) && (to === null || r[0] <= to) && (stop === "" || r[4] === stop) &&
    flags.every((f) => r[5].includes(f)) && (found === null || found.has(`${r[0]}/${r[1]}`)));
  const order = { newest: (a, b) => b[0] - a[0], best: (a, b) => b[3] - a[3], worst: (a, b) => a[3] - b[3], longest: (a, b) => b[7] - a[7] };
  if (order[value("order")]) browser.shown.sort(order[value("order")]);
  browser.end = 0;
  browser.current = -1;
  list.replaceChildren();
  list.scrollTop = 0;
  more();
  document.getElementById("count").textContent = `${browser.shown.length} of ${browser.rows.length} trajectories`;
  if (browser.shown.length) open(0);
  else document.getElementById("detail").replaceChildren(make("p", { class: "soft" }, "None of the trajectories on disk is like that."));
}

async function search() {
  const ticket = ++browser.search, wanted = value("search").toLowerCase(), run = value("run");
  browser.found = null;
  if (wanted) {
    const found = new Set(), steps = [...new Set(browser.rows.map((r) => r[0]))];
    for (const [i, at] of steps.entries()) {
      const trajectories = await unpack(`step-${run}-${at}`);
      if (ticket !== browser.search) return; // a newer search took over
      trajectories.forEach((t, place) => {
        const texts = [t.question, t.truth, t.id, ...t.turns.map((turn) => turn.text)];
        if (texts.some((text) => (text || "").toLowerCase().includes(wanted))) found.add(`${at}/${place}`);
      });
      document.getElementById("count").textContent = `searching: ${i + 1} of ${steps.length} steps`;
    }
    browser.found = found;
  }
  apply();
}

async function open(i) {
  const ticket = ++browser.opened, [at, place] = browser.shown[i], run = value("run");
  while (browser.end <= i) more();
  browser.current = i;
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  const row = list.children[i];
  row.setAttribute("aria-current", "true");
  if (row.offsetTop < list.scrollTop || row.offsetTop + row.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = row.offsetTop - list.clientHeight / 3;
  }
  const trajectory = (await step(run, at))[place];
  if (ticket === browser.opened) show(trajectory);
}

function turnCard(turn, count, view) {
  const own = view === "dialogue" || turn.role === view;
  const absent = !own && !turn.heard;
  const facts = [chip(`${turn.tokens} tokens`)];
  if (own) {
    facts.push(chip(`reward ${signed(turn.reward)}`, kind(turn.reward)));
    facts.push(chip(`advantage ${signed(turn.advantage)}`, kind(turn.advantage)));
    if (turn.log_ratio !== null) facts.push(chip(`log-ratio ${number(turn.log_ratio, 2)}`, Math.abs(turn.log_ratio) > 1 ? "bad" : ""));
    if (turn.update_log_ratio !== null) facts.push(chip(`in the update ${number(turn.update_log_ratio, 2)}`));
    if (turn.clipped !== null) facts.push(chip(turn.clipped ? "clipped" : "not clipped", turn.clipped ? "bad" : ""));
  }
  if (view !== "dialogue") facts.push(chip(own ? (turn.advantage === null ? "own turn, not trained in this step" : "trained: mask 1") : absent ? "not in this row" : "masked: mask 0"));
  return make("div", { class: `turn ${turn.role}${own ? "" : " masked"}${absent ? " absent" : ""}` },
    make("div", { class: "head" }, make("span", { class: "who" }, `${turn.role} ${count}`), ...facts),
    make("div", { class: "text", dir: "auto" }, turn.text));
}

function show(t) {
  const tabs = ["dialogue", "meta_thinking", "reasoning"].map((view) => {
    const button = make("button", { type: "button", "aria-pressed": String(view === browser.tab) }, view === "dialogue" ? view : `${view}'s row`);
    button.onclick = () => { browser.tab = view; show(t); };
    return button;
  });
  // what is said last is heard by nobody: the dialogue is over
  const counts = { meta_thinking: 0, reasoning: 0 };
  const cards = t.turns.map((turn, i) => turnCard({ ...turn, heard: i < t.turns.length - 1 }, ++counts[turn.role], browser.tab));
  document.getElementById("detail").replaceChildren(...[
    make("div", { class: "facts" }, chip(t.acc ? "right" : "wrong", t.acc ? "good" : "bad"), chip(`step ${t.step}`), chip(t.stop_reason),
      chip(`grading: ${t.grade_status}`), ...t.picked.map((p) => chip(p)), ...t.flags.map((f) => chip(f, "bad")),
      chip(`${t.cached_tokens} of ${t.prompt_tokens} prompt tokens cached`)),
    make("div", { class: "soft" }, `trajectory ${t.id} · prompt ${t.uid}`),
    make("div", { class: "quote text", dir: "auto" }, t.question || "(no question)"),
    make("div", { class: "soft text" }, `truth: ${t.truth}`),
    make("div", { class: "tabs" }, ...tabs),
    browser.tab === "dialogue" ? null : make("p", { class: "note" }, "Only this role's own turns train it; prompt and partner are masked."),
    ...cards].filter((node) => node !== null));
}

async function choose() {
  browser.search++;
  browser.rows = await unpack(`index-${value("run")}`);
  browser.found = null;
  document.getElementById("search").value = "";
  apply();
}

if (document.getElementById("browser")) {
  for (const id of ["from", "to", "stop", "order"]) document.getElementById(id).addEventListener("change", apply);
  document.getElementById("run").addEventListener("change", choose);
  document.getElementById("search").addEventListener("change", search);
  document.querySelectorAll("#flags button").forEach((button) => button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    apply();
  }));
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) open(Number(row.dataset.i));
  });
  list.addEventListener("scroll", () => { if (list.scrollTop + 2 * list.clientHeight > list.scrollHeight) more(); });
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const to = browser.current + move;
    if (move && to >= 0 && to < browser.shown.length) { event.preventDefault(); open(to); }
  });
  choose().then(() => { document.documentElement.dataset.ready = "true"; });
} else {
  document.documentElement.dataset.ready = "true";
}
