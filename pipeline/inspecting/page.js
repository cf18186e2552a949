/* The page of `rlhf report`: every text is set as text, and nothing is fetched. */
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { runs, samples } = data;
const several = runs.length > 1;

function make(tag, kind, ...inside) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  node.append(...inside.filter((one) => one !== null && one !== undefined));
  return node;
}

const plural = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits))));
const minus = (text) => text.replace(/^-/, "−");
const seconds = (s) => (s < 120 ? `${Number(s.toPrecision(3))} s` : s < 7200 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`);

/* Light and dark: as the system is, until the button says otherwise. */

const asked = matchMedia("(prefers-color-scheme: dark)");
const kept = { get: () => { try { return localStorage.getItem("rlhf-theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("rlhf-theme", v); } catch { /* a page from a file may be refused it */ } } };
let theme = kept.get() ?? (asked.matches ? "dark" : "light");

function dress() {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  for (const [node, chart] of drawn) Plotly.react(node, traces(chart), layout(chart, node), CONFIG);
}

$("theme").addEventListener("click", () => { theme = theme === "dark" ? "light" : "dark"; kept.set(theme); dress(); });
asked.addEventListener("change", () => { if (!kept.get()) { theme = asked.matches ? "dark" : "light"; dress(); } });

/* Charts: drawn when they come into view. */

const drawn = new Map();
const CONFIG = { displayModeBar: false, responsive: true, showTips: false };
const COARSE = matchMedia("(pointer: coarse)").matches;
const SCALES = {
  light: [[0, "#f3f5f8"], [0.001, "#dce8f5"], [0.5, "#4f92d2"], [1, "#123a66"]],
  dark: [[0, "#20252d"], [0.001, "#1f3a58"], [0.5, "#3f8ad0"], [1, "#d8ecff"]],
};

let unpacking = null;
function plotly() {
  unpacking ??= (async () => {
    const bytes = Uint8Array.from(atob($("plotly").textContent), (c) => c.charCodeAt(0));
    const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
    return window.Plotly;
  })();
  return unpacking;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function traces(chart) {
  return chart.data.map((trace) => (trace.type === "heatmap" ? { ...trace, colorscale: SCALES[theme], xgap: trace.x.length < 40 ? 1 : 0 } : { ...trace, line: { ...trace.line } }));
}

function layout(chart, node) {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"), color: colour("--soft"), automargin: true, exponentformat: "e", minexponent: 5 };
  const joined = (own) => ({ ...axis, ...own, title: { ...own?.title, font: { size: 12 }, standoff: 8 } });
  return {
    ...structuredClone(chart.layout), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: colour("--ink") },
    margin: { l: 48, r: 14, t: 10, b: 40 }, dragmode: COARSE ? false : "zoom", hovermode: chart.data[0].type === "heatmap" ? "closest" : "x unified",
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12 } },
    showlegend: false,
    xaxis: joined({ ...chart.layout.xaxis, showgrid: false, ...whole(chart) }), yaxis: joined(chart.layout.yaxis),
    height: node.clientHeight, width: node.clientWidth,
  };
}

/* Iterations are whole numbers: few of them are each a mark. */
function whole(chart) {
  const at = [...new Set(chart.data.flatMap((trace) => trace.x))].sort((a, b) => a - b);
  return at.length === 1 ? { tickvals: at, range: [at[0] - 0.5, at[0] + 0.5] } : at.at(-1) - at[0] < 6 ? { dtick: 1 } : {};
}

async function draw(node, chart) {
  if (drawn.has(node)) return;
  drawn.set(node, chart);
  let library;
  try { library = await plotly(); } catch (error) { node.textContent = `This browser cannot unpack the charts: ${error.message}`; return; }
  await library.newPlot(node, traces(chart), layout(chart, node), CONFIG);
  node.on("plotly_click", (event) => toIteration(event.points[0].x, event.points[0].data.legendgroup));
  node.dataset.drawn = "yes";
}

const waiting = new Map();
const watcher = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) if (isIntersecting) { watcher.unobserve(target); draw(target, waiting.get(target)); }
}, { rootMargin: "400px 0px" });
addEventListener("beforeprint", () => waiting.forEach((chart, node) => draw(node, chart)));

/* Beside the chart and not in it: it takes the lines that it needs, on a phone as well. */
function legend(chart) {
  const named = new Map(chart.data.filter((trace) => trace.showlegend !== false).map((trace) => [trace.name, trace]));
  return make("ul", "legend", ...[...named.values()].map((trace) => {
    const swatch = make("i", trace.marker?.pattern?.shape ? "hatched" : "");
    swatch.style.color = trace.line?.color ?? trace.marker.color;
    return make("li", "", swatch, trace.name);
  }));
}

function figure(chart) {
  const plot = make("div", "plot");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${chart.name} by iteration, in ${chart.unit}${chart.told ? `: ${chart.told}` : ""}`);
  plot.dataset.chart = chart.name;
  const caption = make("figcaption", "", make("div", "caption", make("h3", "", chart.name), make("span", "told", minus(chart.told))), make("p", "", chart.doc), chart.layout.showlegend ? legend(chart) : null);
  waiting.set(plot, chart);
  watcher.observe(plot);
  return make("figure", "", caption, plot);
}

/* Head. */

function fact(name, value, small, kind) {
  return make("div", kind, make("dt", "", name), make("dd", "", value, small ? make("small", "", small) : null));
}

const ends = (one) => (one.low === undefined ? "" : `${one.low.toFixed(3)} to ${one.high.toFixed(3)}`);

function head(run) {
  const facts = make("dl", "facts");
  const [first, last] = [run.held_out[0], run.held_out.at(-1)];
  if (!first) facts.append(fact("held-out accuracy", "not evaluated", null, "big"));
  else {
    const shown = first === last ? first.accuracy.toFixed(3) : `${first.accuracy.toFixed(3)} → ${last.accuracy.toFixed(3)}`;
    const small = first === last ? ends(first) : [ends(first), ends(last)].filter(Boolean).join(" → ");
    facts.append(fact("held-out accuracy", shown, `${small ? `95 %: ${small}; ` : ""}${plural(last.prompts, "prompt")}`, "big"));
  }
  const unfinished = run.planned && run.finished < run.planned;
  facts.append(fact("iterations", run.planned ? `${run.finished} of ${run.planned}` : String(run.finished), unfinished ? "not finished" : null));
  facts.append(fact("responses", run.responses.toLocaleString("en")), fact("time of the stages", seconds(run.seconds)));
  facts.append(fact("promoted", run.promoted ?? "none"));
  if (run.ended) facts.append(fact("made", run.ended.replace("T", " ").replace(/:\d\d\+0000$/, " UTC")));
  if (run.commits.length) facts.append(fact("commit", run.commits.join(", ")));
  const idea = [`recipe ${run.recipe}`, run.idea, run.paper].filter(Boolean).join(" · ");
  const node = make("div", "run", several ? make("h2", "", run.name) : null, make("p", "idea", idea), facts);
  if (!run.responses) node.append(make("p", "note", "No iteration has sampled anything yet: there is nothing to draw. `rlhf run` goes on with it."));
  node.style.borderLeftColor = run.colour;
  return node;
}

document.title = `${data.title}: rlhf report`;
$("title").textContent = several ? `${plural(runs.length, "run")}: ${data.title}` : data.title;
document.body.classList.toggle("single", !several);
$("runs").append(...runs.map(head));

$("curves-note").textContent = data.curves.length ? "Press a point to read the responses of its iteration." : "Nothing is measured yet.";
$("curve-charts").append(...data.curves.map(figure));
const missing = Object.entries(data.missing);
$("missing").textContent = missing.length ? `Not measured here: ${missing.map(([name, why]) => `${name} (${why})`).join("; ")}.` : "";

$("spread-note").textContent = data.histograms.some((one) => one.length) ? "All responses of the loop, not only those below." : "No responses yet.";
$("histograms").append(...data.histograms.flatMap((charts, i) => charts.length ? [
  several ? make("h3", "", runs[i].name) : null, make("div", "charts broad", ...charts.map(figure)),
].filter(Boolean) : []));

/* Responses. */

const rows = samples.rows;
const size = rows.run?.length ?? 0;
const PAGE = 50;
/* A prompt that was drawn twice has two groups, ID and ID#1. */
const base = rows.prompt_id?.map((id) => id.split("#")[0]) ?? [];
const pieces = (i) => rows.pieces[i]?.map((one) => samples.pieces[one]) ?? null;
const texts = Array.from({ length: size }, (_, i) => {
  if (typeof rows.text[i] === "string") return rows.text[i];
  const whole = pieces(i).join("");
  return rows.text[i] === null ? whole : whole.slice(0, rows.text[i]);
});
const asks = (i) => (rows.prompt[i] === null ? "" : samples.prompts[rows.prompt[i]]);
const phase = (i) => (rows.phase[i] === "loop" ? "training" : "evaluation");
const isRight = (i) => rows.gold[i] ?? rows.correct[i];
const found = texts.map((text, i) => `${text}\n${asks(i)}\n${rows.prompt_id[i]}`.toLowerCase());
const state = { prompt: null, page: 0, chosen: null, up: true, shown: [] };

function options(id, entries) {
  const grouped = entries.map((entry) => {
    if (!Array.isArray(entry[1])) return new Option(entry[1], entry[0]);
    const group = make("optgroup", "", ...entry[1].map(([value, text]) => new Option(text, value)));
    group.label = entry[0];
    return group;
  });
  $(id).replaceChildren(...grouped);
}

const unique = (values) => [...new Set(values.filter((value) => value !== null))];
const plain = (values) => values.map((value) => [String(value), String(value)]);
if (size) {
  options("f-run", [["", "all"], ...runs.map((run, i) => [String(i), run.name])]);
  options("f-phase", [["", "all"], ["loop", "training"], ["evaluation", "evaluation"]]);
  options("f-iteration", [["", "all"], ...plain(unique(rows.iteration).sort((a, b) => a - b))]);
  options("f-verdict", [["", "all"], ["by the reference", [["right", "right"], ["wrong", "wrong"], ["unknown", "not known"]]], ["verdict", unique(rows.verdict).sort().map((v) => [`=${v}`, v])]]);
  options("f-kept", [["", "all"], ["kept", "kept"], ["dropped", "dropped"], ["dropped because", unique(rows.dropped).sort().map((v) => [`=${v}`, v])]]);
  options("f-finish", [["", "all"], ...plain(unique(rows.finish).sort())]);
  options("f-why", [["", "all"], ...plain(unique(rows.why.flat()))]);
}
const SORTS = { iteration: rows.iteration, reward: rows.reward, advantage: rows.advantage, length: rows.length, "KL to reference": rows.divergence };
options("sort", Object.entries(SORTS).filter(([, values]) => values?.some((v) => v !== null)).map(([name]) => [name, name]));

const VERDICTS = { right: (i) => isRight(i) === true, wrong: (i) => isRight(i) === false, unknown: (i) => isRight(i) === null };
const KEPT = { kept: (i) => rows.keep[i] === true, dropped: (i) => rows.dropped[i] !== null };
const equal = (id, values) => (i) => $(id).value === "" || String(values[i]) === $(id).value;
const named = (id, known, values) => (i) => $(id).value === "" || (known[$(id).value]?.(i) ?? `=${values[i]}` === $(id).value);
const FILTERS = size ? [
  equal("f-run", rows.run), equal("f-phase", rows.phase), equal("f-iteration", rows.iteration), equal("f-finish", rows.finish),
  named("f-verdict", VERDICTS, rows.verdict), named("f-kept", KEPT, rows.dropped),
  (i) => $("f-why").value === "" || rows.why[i].includes($("f-why").value),
  (i) => $("f-low").value === "" || (rows.reward[i] !== null && rows.reward[i] >= Number($("f-low").value)),
  (i) => $("f-high").value === "" || (rows.reward[i] !== null && rows.reward[i] <= Number($("f-high").value)),
  (i) => state.prompt === null || (base[i] === state.prompt.base && rows.run[i] === state.prompt.run),
  (i) => $("search").value === "" || found[i].includes($("search").value.toLowerCase()),
] : [];

function filter({ keep = false } = {}) {
  const by = SORTS[$("sort").value] ?? [];
  const sign = state.up ? 1 : -1;
  const least = (a, b) => (by[a] === null) - (by[b] === null) || sign * (by[a] - by[b]) || rows.iteration[a] - rows.iteration[b] || a - b;
  state.shown = Array.from({ length: size }, (_, i) => i).filter((i) => FILTERS.every((fits) => fits(i))).sort(least);
  $("direction").textContent = state.up ? "least first" : "greatest first";
  $("count").textContent = `${state.shown.length.toLocaleString("en")} of ${plural(size, "response")}`;
  chip();
  const at = keep ? state.shown.indexOf(state.chosen) : -1;
  state.page = at >= 0 ? Math.floor(at / PAGE) : 0;
  if (at < 0) choose(state.shown[0] ?? null); else list();
}

function chip() {
  $("prompt-chip").replaceChildren();
  if (state.prompt === null) return;
  const end = make("button", "", "✕");
  end.type = "button";
  end.setAttribute("aria-label", "All prompts again");
  end.addEventListener("click", () => { state.prompt = null; filter({ keep: true }); });
  $("prompt-chip").append(make("span", "chip", `prompt ${state.prompt.base}`, end));
}

function mark(i) {
  const right = isRight(i);
  const node = make("span", right === null ? "unknown" : right ? "right" : "wrong", right === null ? "·" : right ? "✓" : "✗");
  node.setAttribute("aria-label", right === null ? "not known" : right ? "right" : "wrong");
  return node;
}

const line = (text) => heatPrintable(text.slice(0, 160)).replace(/↵\n/g, "↵ ");

function row(i) {
  const node = make("div", "row", make("span", "", `${several ? "■ " : ""}${rows.phase[i] === "loop" ? "" : "eval "}${rows.iteration[i]}`), mark(i),
    make("span", "", minus(number(rows.reward[i]))), make("span", "", rows.length[i].toLocaleString("en")), make("span", "text", line(texts[i])));
  node.id = `response-${i}`;
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", String(i === state.chosen));
  node.dataset.index = i;
  if (several) node.firstChild.style.color = runs[rows.run[i]].colour;
  node.firstChild.title = `${several ? `${runs[rows.run[i]].name}, ` : ""}${phase(i)}, iteration ${rows.iteration[i]}`;
  return node;
}

function list() {
  const here = state.shown.slice(state.page * PAGE, (state.page + 1) * PAGE);
  $("list").replaceChildren(...(here.length ? here.map(row) : [make("div", "none", size ? "No response fits." : "This page holds no responses.")]));
  const last = Math.max(1, Math.ceil(state.shown.length / PAGE));
  $("pages").textContent = `page ${state.page + 1} of ${last}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page >= last - 1;
  if (state.chosen === null) $("list").removeAttribute("aria-activedescendant");
  else $("list").setAttribute("aria-activedescendant", `response-${state.chosen}`);
  const node = $(`response-${state.chosen}`);
  if (node) $("list").scrollTop = Math.max(0, Math.min($("list").scrollTop, node.offsetTop - $("list").offsetTop), node.offsetTop - $("list").offsetTop + node.offsetHeight - $("list").clientHeight);
}

function choose(i) {
  state.chosen = i;
  const at = state.shown.indexOf(i);
  if (at >= 0) state.page = Math.floor(at / PAGE);
  list();
  detail(i);
}

function step(by) {
  const at = Math.max(0, Math.min(state.shown.length - 1, state.shown.indexOf(state.chosen) + by));
  if (state.shown.length) choose(state.shown[at]);
}

const narrow = matchMedia("(max-width: 860px)");
const read = () => { $("detail").focus({ preventScroll: true }); $("detail").scrollIntoView({ block: "start" }); };
const KEYS = { ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(PAGE), PageUp: () => step(-PAGE), Home: () => step(-size), End: () => step(size), Enter: read };
$("list").addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("list").addEventListener("click", ({ target }) => {
  const node = target.closest("[data-index]");
  if (!node) return;
  choose(Number(node.dataset.index));
  if (narrow.matches) read();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  event.preventDefault();
  $("search").focus();
  $("search").scrollIntoView({ block: "center" });
});
$("detail").addEventListener("keydown", (event) => { if (event.key === "Escape") { $("list").focus(); } });
$("previous").addEventListener("click", () => step(-PAGE));
$("next").addEventListener("click", () => step(PAGE));
$("filters").addEventListener("input", () => filter());
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", () => { clear(); filter(); });
$("direction").addEventListener("click", () => { state.up = !state.up; filter(); });
$("sort").addEventListener("change", () => { state.up = $("sort").value === "iteration"; filter(); });

function clear() {
  $("filters").reset();
  state.prompt = null;
  state.up = true;
}

function toIteration(iteration, name) {
  clear();
  if ([...$("f-iteration").options].some((one) => one.value === String(iteration))) $("f-iteration").value = String(iteration);
  const run = runs.findIndex((one) => one.name === name);
  if (several && run >= 0) $("f-run").value = String(run);
  filter();
  $("samples").scrollIntoView();
}

let ownScale = false;
let column = Object.keys(samples.columns)[0] ?? null;

function detail(i) {
  if (i === null) { $("detail").replaceChildren(make("div", "none", "Nothing to show.")); return; }
  const back = make("button", "back", "Back to the list");
  back.type = "button";
  back.addEventListener("click", () => { $("list").focus({ preventScroll: true }); $("list").scrollIntoView({ block: "center" }); });
  const title = `${several ? `${runs[rows.run[i]].name}: ` : ""}${phase(i)}, iteration ${rows.iteration[i]}, sample ${rows.sample[i]} of ${rows.prompt_id[i]}`;
  const right = rows.gold[i] ?? rows.correct[i];
  const facts = make("dl", "facts",
    fact("reward", minus(number(rows.reward[i]))), fact("verdict", make("span", right === null ? "" : right ? "right" : "wrong", rows.verdict[i] ?? (right === null ? "none" : right ? "right" : "wrong"))),
    rows.extracted[i] !== null ? fact("answer found", rows.extracted[i]) : null, rows.target[i] !== null ? fact("compared with", rows.target[i]) : null,
    rows.vote_share[i] !== null ? fact("share of votes", number(rows.vote_share[i])) : null,
    rows.keep[i] === null ? null : fact("training", rows.phase[i] !== "loop" ? "held out" : rows.keep[i] ? "kept" : `dropped: ${rows.dropped[i]}`),
    fact("length", plural(rows.length[i], "token")), fact("finish", rows.finish[i] === "length" ? "cut at the limit" : rows.finish[i]),
    rows.advantage[i] !== null ? fact("mean advantage", minus(number(rows.advantage[i]))) : null,
    rows.divergence[i] !== null ? fact("KL to reference", `${minus(number(rows.divergence[i]))} nat`) : null, fact("chosen as", rows.why[i].join(", ")));
  const response = make("div");
  $("detail").replaceChildren(back, make("h3", "", title), facts, make("h4", "", "Prompt"), make("pre", "", rows.prompt[i] === null ? "not stored" : asks(i)), make("h4", "", "Response"), response, ...same(i));
  tokens(response, i);
}

function tokens(element, i) {
  const cut = pieces(i);
  const there = cut ? Object.keys(samples.columns).filter((name) => rows[name][i] !== null) : [];
  if (!there.length) { element.replaceChildren(make("pre", "", texts[i])); return; }
  const shown = there.includes(column) ? column : there[0];
  const select = make("select", "", ...there.map((name) => new Option(name, name, false, name === shown)));
  const plainly = new Option("none", "", false, column === "");
  select.append(plainly);
  select.id = "column";
  const scale = make("div");
  const drawnHere = make("div");
  select.addEventListener("change", () => { column = select.value; tokens(element, i); $("column").focus(); });
  const label = make("label", "", "Colour of the tokens ", select);
  element.replaceChildren(make("div", "tools", label, column === "" ? null : scale), drawnHere);
  if (column === "") { drawnHere.replaceChildren(make("pre", "", texts[i])); return; }
  const { doc, unit, span } = samples.columns[shown];
  const spread = (value) => (Array.isArray(value) ? value : cut.map(() => value));
  const columns = Object.fromEntries(there.map((name) => [name, spread(rows[name][i])]));
  const end = Math.max(...columns[shown].map((value) => Math.abs(value ?? 0)));
  const ends = ownScale && end > 0 ? [-end, span[1] > 0 ? end : 0] : span;
  const own = make("input");
  own.type = "checkbox";
  own.id = "own-scale";
  own.checked = ownScale;
  own.addEventListener("change", () => { ownScale = own.checked; tokens(element, i); $("own-scale").focus(); });
  element.firstChild.append(make("label", "", own, " scale of this response"));
  heatScale(scale, ends, unit);
  heat(drawnHere, { pieces: cut, columns }, shown, ends);
  drawnHere.append(make("p", "note", doc));
}

/* One prompt through all iterations. */
const byPrompt = new Map();
for (let i = 0; i < size; i += 1) {
  const key = `${rows.run[i]}/${base[i]}`;
  if (!byPrompt.has(key)) byPrompt.set(key, []);
  byPrompt.get(key).push(i);
}

function same(i) {
  const others = [...byPrompt.get(`${rows.run[i]}/${base[i]}`)].sort((a, b) => rows.iteration[a] - rows.iteration[b] || a - b);
  if (others.length < 2) return [];
  const times = new Set(others.map((one) => `${rows.phase[one]}${rows.iteration[one]}`)).size;
  const only = make("button", "link", "list only these");
  only.type = "button";
  only.id = "only-prompt";
  only.addEventListener("click", () => {
    clear();
    state.prompt = { base: base[i], run: rows.run[i] };
    filter({ keep: true });
  });
  const items = others.map((one) => {
    const button = make("button", "", make("span", "", `${rows.phase[one] === "loop" ? "iteration" : "eval."} ${rows.iteration[one]}`), mark(one), make("span", "", minus(number(rows.reward[one]))), make("span", "text", line(texts[one])));
    button.type = "button";
    if (one === i) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => choose(one));
    return make("li", "", button);
  });
  return [make("h4", "", `This prompt: ${plural(others.length, "response")} of ${plural(times, "iteration")}, `, only), make("ul", "same", ...items)];
}

const told = (counts) => Object.entries(counts).map(([name, [n, of]]) => `${n.toLocaleString("en")} of ${of.toLocaleString("en")} responses of ${name === "loop" ? "training" : "evaluation"}`).join(", ");
$("chosen").textContent = samples.chosen.map((counts, i) => `${several ? `${runs[i].name}: ` : ""}${told(counts) || "none yet"}`).join("; ") + (size ? " are in this page." : ".");
$("how").append(...samples.how.map((one) => make("li", "", one)), ...samples.notes.map((one) => make("li", "", `Without tokens: ${one}`)));
for (const [id, values] of [["f-run", rows.run], ["f-phase", rows.phase], ["f-finish", rows.finish]]) $(id).closest("label").hidden = !size || unique(values).length < 2;

/* Lineage: layers from left to right, or from top to bottom where there is no room. */

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...inside) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}

function layered({ nodes, edges }) {
  const layer = nodes.map(() => 0);
  for (let turn = 0; turn < nodes.length; turn += 1) for (const [a, b] of edges) layer[b] = Math.max(layer[b], layer[a] + 1);
  nodes.forEach((_, n) => {
    const children = edges.filter(([a]) => a === n).map(([, b]) => layer[b]);
    if (children.length && !edges.some(([, b]) => b === n)) layer[n] = Math.min(...children) - 1;
  });
  const places = nodes.map((node, n) => ({ node, layer: layer[n] }));
  const paths = edges.map(([a, b]) => {
    const path = [a];
    for (let at = layer[a] + 1; at < layer[b]; at += 1) path.push(places.push({ node: null, layer: at }) - 1);
    return [...path, b];
  });
  const layers = [];
  places.forEach((place, n) => (layers[place.layer] ??= []).push(n));
  const near = places.map(() => ({ up: [], down: [] }));
  for (const path of paths) path.slice(1).forEach((n, at) => { near[n].up.push(path[at]); near[path[at]].down.push(n); });
  layers.forEach((layer) => layer.forEach((n, slot) => { places[n].at = slot; }));
  const middle = (n, side) => (near[n][side].length ? near[n][side].reduce((sum, p) => sum + places[p].at, 0) / near[n][side].length : places[n].at);
  for (let turn = 0; turn < 8; turn += 1) {
    const side = turn % 2 ? "down" : "up";
    for (const here of turn % 2 ? layers.toReversed() : layers) here.sort((a, b) => middle(a, side) - middle(b, side)).forEach((n, slot) => { places[n].at = slot; });
  }
  return { places, paths, layers, near };
}

/* Where in its layer each thing stands: near what it is joined to, and apart from its neighbours. */
function spread({ places, layers, near }, full, gap) {
  const half = (n) => (places[n].node ? full / 2 : 7);
  for (const layer of layers) {
    let at = 0;
    for (const n of layer) { places[n].at = at + half(n); at += 2 * half(n) + gap; }
    for (const n of layer) places[n].at -= at / 2;
  }
  for (let turn = 0; turn < 24; turn += 1) {
    for (const layer of turn % 2 ? layers.toReversed() : layers) {
      const wanted = layer.map((n) => {
        const joined = [...near[n].up, ...near[n].down];
        return joined.length ? joined.reduce((sum, p) => sum + places[p].at, 0) / joined.length : places[n].at;
      });
      const apart = (i) => half(layer[i]) + half(layer[i + 1]) + gap;
      const [least, most] = [[...wanted], [...wanted]];
      for (let i = 1; i < layer.length; i += 1) least[i] = Math.max(least[i], least[i - 1] + apart(i - 1));
      for (let i = layer.length - 2; i >= 0; i -= 1) most[i] = Math.min(most[i], most[i + 1] - apart(i));
      layer.forEach((n, i) => { places[n].at = (least[i] + most[i]) / 2; });
    }
  }
  const first = Math.min(...places.map((place, n) => place.at - half(n)));
  places.forEach((place) => { place.at -= first; });
  return Math.max(...places.map((place, n) => place.at + half(n)));
}

const MODELS = ["policy", "critic", "reward_model"];

function flow() {
  const run = runs[Number($("flow-run").value) || 0];
  const chosen = run.flows[Number($("flow-at").value)];
  if (!chosen) { $("flow").replaceChildren(make("p", "none", "Nothing is made yet.")); return; }
  const plan = layered(chosen);
  const { places, paths, layers } = plan;
  const [w, h] = [Math.max(112, ...chosen.nodes.map((node) => Math.max(node.name.length * 7.8, words(node).length * 6.1))) + 20, 46];
  const across = $("flow").clientWidth >= layers.length * (w + 30);
  const breadth = spread(plan, across ? h : w, across ? 16 : 14);
  const along = across ? w + 40 : h + 32;
  const centre = ({ layer, at }) => (across ? [layer * along + w / 2 + 4, at + 4] : [at + 4, layer * along + h / 2 + 4]);
  const length = (layers.length - 1) * along + (across ? w : h) + 8;
  const [W, H] = across ? [length, breadth + 8] : [breadth + 8, length];
  const head = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M0 0L8 4L0 8Z" }));
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": `${chosen.title}: ${chosen.nodes.map((node) => `${node.name} ${words(node)}`).join(", ")}` }, svg("defs", {}, head));
  for (const path of paths) {
    // Beside the boxes of a layer that it passes, a line runs straight.
    const points = path.flatMap((n, at) => {
      const [x, y] = centre(places[n]);
      const ends = across ? [[x - w / 2, y], [x + w / 2, y]] : [[x, y - h / 2], [x, y + h / 2]];
      return at === 0 ? [ends[1]] : at === path.length - 1 ? [ends[0]] : ends;
    });
    const bends = points.slice(1).map(([x, y], at) => {
      const [px, py] = points[at];
      return across ? `C${(px + x) / 2} ${py} ${(px + x) / 2} ${y} ${x} ${y}` : `C${px} ${(py + y) / 2} ${x} ${(py + y) / 2} ${x} ${y}`;
    });
    root.append(svg("path", { class: "edge", d: `M${points[0].join(" ")}${bends.join("")}`, "marker-end": "url(#arrow)" }));
  }
  for (const place of places.filter((one) => one.node)) {
    const [x, y] = centre(place);
    const { node } = place;
    const model = MODELS.includes(node.kind);
    const name = svg("text", { x, y: words(node) ? y - 3 : y + 4, "text-anchor": "middle", class: "name" });
    name.textContent = node.name;
    const small = svg("text", { x, y: y + 14, "text-anchor": "middle", class: "told" });
    small.textContent = words(node);
    root.append(svg("g", { class: `node${model ? " model" : ""}${node.inside ? "" : " outside"}` }, svg("rect", { x: x - w / 2, y: y - h / 2, width: w, height: h, rx: model ? 2 : 10 }), name, small));
  }
  $("flow").replaceChildren(root);
}

function words(node) {
  return [node.from ?? "", node.rows === undefined ? "" : plural(node.rows, "row"), node.seconds === undefined || !node.inside ? "" : seconds(node.seconds)].filter(Boolean).join(" · ");
}

function flows() {
  const { flows: all } = runs[Number($("flow-run").value) || 0];
  const last = all.findLastIndex((one) => one.title.startsWith("iteration"));
  options("flow-at", all.map((one, i) => [String(i), one.title]));
  $("flow-at").value = String(Math.max(0, last));
  flow();
}
options("flow-run", runs.map((run, i) => [String(i), run.name]));
$("flow-run").addEventListener("change", flows);
$("flow-at").addEventListener("change", flow);

/* Cost and experiment. */

function table(header, lines, numbers = []) {
  const cell = (tag) => (value, i) => make(tag, numbers.includes(i) ? "number" : "", value);
  return make("div", "scroll", make("table", "", make("thead", "", make("tr", "", ...header.map(cell("th")))), make("tbody", "", ...lines.map((one) => make("tr", "", ...one.map(cell("td")))))));
}

const PHASES = { foundations: "foundations", loop: "loop", evaluation: "evaluation" };

function totals(run) {
  const sums = new Map();
  for (const { phase: where, stage, seconds: s, artifacts } of run.costs) {
    const key = `${where}/${stage}`;
    const sum = sums.get(key) ?? { where, stage, s: 0, artifacts: 0 };
    sums.set(key, { ...sum, s: sum.s + s, artifacts: sum.artifacts + artifacts });
  }
  const all = [...sums.values()].reduce((sum, one) => sum + one.s, 0) || 1;
  const order = [...sums.values()].sort((a, b) => b.s - a.s);
  return table(["stage", "where", "artifacts", "seconds", "share", ""], order.map((one) => {
    const bar = make("span", "share");
    bar.style.width = `${(8 * one.s) / all}rem`;
    return [one.stage, PHASES[one.where], String(one.artifacts), one.s.toFixed(one.s < 10 ? 2 : 1), `${((100 * one.s) / all).toFixed(1)} %`, bar];
  }), [2, 3, 4]);
}

$("costs").append(...runs.map((run) => make("div", "run-cost", several ? make("h3", "", run.name) : null, run.cost ? make("div", "charts broad", figure(run.cost)) : null,
  run.costs.length ? totals(run) : make("p", "note", "No stage has run yet."))));

if (several) {
  const written = (value) => (value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  $("differences").append(make("h3", "", "What differs"), data.differences.length
    ? table(["setting", ...runs.map((run) => run.name)], data.differences.map(({ setting, values }) => [setting, ...values.map(written)]))
    : make("p", "note", "Nothing: the experiments are equal."));
}
$("experiments").append(...runs.map((run) => {
  const node = make("details", "", make("summary", "", several ? `${run.name}: experiment.toml, resolved` : "experiment.toml, resolved"), make("pre", "", run.text));
  node.open = !several;
  return node;
}));
$("footer").textContent = `Written by rlhf report from ${runs.map((run) => run.folder).join(", ")}. Nothing in this page is fetched from elsewhere.`;

let before = innerWidth;
addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; flow(); } });
dress();
filter();
flows();
document.documentElement.dataset.ready = "yes";
})();
