// The page of a run: curves, rollouts, text.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const COLORS = ["#1f77b4", "#e07b00", "#c4457c", "#2a9d6f", "#7c5cd6", "#8a6d3b"];
const LEVEL_COLORS = { easy: "#0072b2", medium: "#e69f00", hard: "#c4457c" };
const FIRST_METRICS = [
  "eval/reasoning", "eval/questions/accuracy", "reward/drawn_mean", "length/mean", "policy/entropy", "format/rate", "groups/drawn_zero_variance",
];
const PHASES = ["data", "rescore", "reshard", "rollout", "reward", "update", "checkpoint", "evaluation"];
const SHOWN_AT_ONCE = 100;

const run = () => RUNS[Number(byId("run")?.value ?? 0)];

function movingMean(values) {
  const half = Math.floor(Math.max(5, values.length / 20) / 2);
  return values.map((_, i) => mean(values.slice(Math.max(0, i - half), i + half + 1)));
}

function lineTraces(run, key, color, name) {
  const [x, y] = run.metrics[key];
  const few = x.length < 12;
  const faint = { x, y, mode: few ? "lines+markers" : "lines", line: { width: few ? 2 : 1, color }, opacity: few ? 1 : 0.35, name, showlegend: few && Boolean(name) };
  const smooth = { x, y: movingMean(y), mode: "lines", line: { width: 2, color }, name, showlegend: Boolean(name), hoverinfo: "skip" };
  return few ? [faint] : [faint, smooth];
}

/** Returns the curve of a metric with its 95 % interval, if it has one. */
function intervalTraces(run, key, color, name, dash) {
  const [x, y] = run.metrics[key];
  const ends = ["low", "high"].map((end) => run.metrics[`${key}/${end}`]?.[1]);
  const error = ends.every(Boolean)
    ? { type: "data", symmetric: false, array: ends[1].map((high, i) => high - y[i]), arrayminus: ends[0].map((low, i) => y[i] - low), width: 3, thickness: 1 }
    : undefined;
  return [{ x, y, mode: "lines+markers", line: { color, dash }, error_y: error, name }];
}

function drawMetric(key, target) {
  const traces = [];
  if (key === "eval/reasoning") {
    RUNS.forEach((run, i) => {
      for (const level of Object.keys(DATA.difficulties)) {
        const name = RUNS.length > 1 ? `${level}, ${label(run.name)}` : level;
        const dash = ["solid", "dash", "dot", "dashdot"][i % 4];
        if (run.metrics[`${key}/${level}`]) traces.push(...intervalTraces(run, `${key}/${level}`, LEVEL_COLORS[level], name, dash));
      }
    });
    return plot(target, "Accuracy by reasoning, held-out positions", traces, { yaxis: { tickformat: ".0%", rangemode: "tozero" } });
  }
  RUNS.forEach((run, i) => {
    if (!run.metrics[key]) return;
    const name = RUNS.length > 1 ? label(run.name) : undefined;
    traces.push(...(run.metrics[`${key}/low`] ? intervalTraces : lineTraces)(run, key, COLORS[i % COLORS.length], name));
  });
  return plot(target, key, traces);
}

const allMetrics = [...new Set(RUNS.flatMap((run) => Object.keys(run.metrics)))].sort();
const hasMetric = (key) => (key === "eval/reasoning" ? allMetrics.some((name) => name.startsWith(`${key}/`)) : allMetrics.includes(key));
let chosenMetrics = [];

function toggleMetric(key) {
  const id = `chart-${key}`;
  if (chosenMetrics.includes(key)) {
    chosenMetrics = chosenMetrics.filter((other) => other !== key);
    Plotly.purge(byId(id));
    byId(id).remove();
  } else {
    chosenMetrics.push(key);
    const chart = element("div", { class: "chart", id });
    byId("charts").append(chart);
    drawMetric(key, chart);
  }
  listMetrics();
}

function listMetrics() {
  const words = byId("metric-search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = allMetrics.filter((key) => words.every((word) => key.includes(word)));
  byId("metric-list").replaceChildren(
    ...found.map((key) => {
      const button = element("button", { type: "button", "aria-pressed": String(chosenMetrics.includes(key)) }, key);
      button.addEventListener("click", () => toggleMetric(key));
      return button;
    }),
  );
}

function resetMetrics() {
  for (const key of [...chosenMetrics]) toggleMetric(key);
  byId("metric-search").value = "";
  for (const key of FIRST_METRICS.filter(hasMetric)) toggleMetric(key);
  listMetrics();
}

function drawScaling() {
  const traces = [];
  const rows = [];
  RUNS.forEach((run, i) => {
    for (const fit of run.fits) {
      const color = RUNS.length > 1 ? COLORS[i % COLORS.length] : LEVEL_COLORS[fit.level];
      const name = RUNS.length > 1 ? `${fit.level}, ${label(run.name)}` : fit.level;
      traces.push({ x: fit.flops, y: fit.accuracy, mode: "markers", marker: { color, size: 9 }, name });
      if (fit.curve) traces.push({ x: fit.curve.flops, y: fit.curve.accuracy, mode: "lines", line: { color }, showlegend: false, hoverinfo: "skip" });
      if (fit.before !== null) {
        const ends = [fit.flops[0], fit.flops.at(-1)];
        traces.push({ x: ends, y: [fit.before, fit.before], mode: "lines", line: { color, dash: "dot" }, name: "before training", legendgroup: "before", showlegend: !traces.some((trace) => trace.legendgroup) });
      }
      const law = fit.law;
      const quality = law ? `, R² = ${law.r_squared.toFixed(3)}` : "";
      const found = fit.reason
        ? `not determined by ${fit.flops.length} evaluation${fit.flops.length === 1 ? "" : "s"} after the start: ${fit.reason}${quality}`
        : `A = ${law.A.toExponential(2)}, α = ${law.alpha.toFixed(3)}, P* = ${(100 * law.p_star).toFixed(1)} %${quality}`;
      rows.push(element("li", {}, `${RUNS.length > 1 ? `${run.name}, ` : ""}${fit.level}: ${found}`));
    }
  });
  if (!traces.length) {
    byId("scaling-chart").remove();
    byId("fits").append(element("p", {}, "There is no evaluation at text positions after the first step."));
    return;
  }
  byId("fits").append(element("ul", {}, ...rows));
  const axes = { xaxis: { type: "log", exponentformat: "power", title: { text: "training compute (FLOPs)" } }, yaxis: { tickformat: ".0%", title: { text: "accuracy" } } };
  plot(byId("scaling-chart"), "", traces, { ...axes, hovermode: "closest", margin: { l: 60, r: 15, t: 20, b: 45 } });
}

function drawThroughput() {
  const target = byId("throughput-charts");
  const add = (title, traces, layout) => {
    const chart = element("div", { class: "chart" });
    target.append(chart);
    plot(chart, title, traces, layout);
  };
  RUNS.forEach((run) => {
    const phases = PHASES.filter((phase) => run.metrics[`time/${phase}`]);
    const traces = phases.map((phase, i) => {
      const [x, y] = run.metrics[`time/${phase}`];
      return { x, y, type: "bar", name: phase, marker: { color: [...COLORS, "#999999", "#b8b8b8"][i] } };
    });
    if (traces.length) add(RUNS.length > 1 ? `Seconds, ${label(run.name)}` : "Seconds of a step", traces, { barmode: "stack", bargap: 0 });
  });
  for (const [key, title, layout] of [
    ["rollout/occupancy", "Decode slots in use", { yaxis: { tickformat: ".0%", range: [0, 1] } }],
    ["speed/mfu", "Model FLOPs utilization", { yaxis: { tickformat: ".1%", rangemode: "tozero" } }],
    ["speed/tokens_per_second", "Generated tokens per second", {}],
  ]) {
    const traces = RUNS.flatMap((run, i) => (run.metrics[key] ? lineTraces(run, key, COLORS[i % COLORS.length], RUNS.length > 1 ? label(run.name) : undefined) : []));
    if (traces.length) add(title, traces, layout);
  }
}

// --- rollouts ------------------------------------------------------------------------------------------

const filters = byId("filters");
let found = [];
let selected = -1;

function matches(group, filter) {
  const rewards = group.samples.map((sample) => sample.reward);
  const uniform = rewards.every((reward) => reward === rewards[0]);
  return (
    group.kind === filter.kind &&
    (filter.from === "" || group.step >= Number(filter.from)) &&
    (filter.to === "" || group.step <= Number(filter.to)) &&
    (filter.status === "" || group.samples.some((sample) => sample.status === filter.status)) &&
    (filter.difficulty === "" || group.entropy > DATA.difficulties[filter.difficulty]) &&
    (filter.reward === "" || (filter.reward === "mixed" ? !uniform : uniform && (filter.reward === "all" ? rewards[0] >= 1 : rewards[0] === 0))) &&
    (filter.text === "" || [group.context, group.truth, ...group.samples.flatMap((s) => [s.reasoning, s.answer ?? ""])].some((text) => text.toLowerCase().includes(filter.text.toLowerCase())))
  );
}

function applyFilters() {
  const filter = Object.fromEntries(new FormData(filters));
  const groups = run().groups;
  const ofKind = groups.filter((group) => group.kind === filter.kind);
  found = ofKind.filter((group) => matches(group, filter));
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${ofKind.length.toLocaleString("en")} prompts`;
  byId("groups").replaceChildren();
  listGroups(0);
  select(found.length ? 0 : -1, false);
  if (DATA.live) remembered("filters", JSON.stringify(filter));
}

/** Adds the next prompts to the list, with a button for more. */
function listGroups(start) {
  const list = byId("groups");
  list.querySelector(".more")?.remove();
  found.slice(start, start + SHOWN_AT_ONCE).forEach((group, i) => {
    const right = group.samples.filter(isCorrect).length;
    const facts = `step ${group.step} · ${right}/${group.samples.length} correct${group.entropy === null ? "" : ` · ${group.entropy.toFixed(2)} nats`}`;
    const tail = element("span", { class: "tail" }, element("bdi", {}, group.context.slice(-60).replaceAll("\n", "⏎")));
    const item = element("div", { class: "item", role: "option", id: `item-${start + i}`, "aria-selected": "false" }, tail, element("span", { class: "facts" }, facts));
    item.addEventListener("click", () => select(start + i));
    list.append(item);
  });
  if (start + SHOWN_AT_ONCE < found.length) {
    const more = element("button", { type: "button", class: "more" }, "Show more");
    more.addEventListener("click", () => listGroups(start + SHOWN_AT_ONCE));
    list.append(more);
  }
}

function select(index, scroll = true) {
  byId(`item-${selected}`)?.setAttribute("aria-selected", "false");
  selected = index;
  const item = byId(`item-${index}`);
  if (!item) {
    byId("groups").removeAttribute("aria-activedescendant");
    byId("group").replaceChildren(element("p", { class: "hint" }, run().groups.length ? "No prompt matches these filters." : "This run has no rollouts to show."));
    return;
  }
  item.setAttribute("aria-selected", "true");
  byId("groups").setAttribute("aria-activedescendant", item.id);
  if (scroll) item.scrollIntoView({ block: "nearest" });
  showGroup(byId("group"), found[index]);
}

function fillChoices() {
  const statuses = [...new Set(RUNS.flatMap((run) => run.groups.flatMap((group) => group.samples.map((sample) => sample.status))))].sort();
  filters.elements.status.append(...statuses.map((status) => element("option", { value: status }, status)));
  for (const [level, nats] of Object.entries(DATA.difficulties)) {
    filters.elements.difficulty.append(element("option", { value: level }, `${level} (> ${nats} nats)`));
  }
  const saved = DATA.live ? JSON.parse(remembered("filters") ?? "{}") : {};
  for (const [name, value] of Object.entries(saved)) {
    if (filters.elements[name]) filters.elements[name].value = value;
  }
}

// --- text ----------------------------------------------------------------------------------------------

let groupsAt = new Map(); // From "kind split window position" to the group.

/** Returns what a token is colored by, from 0 to 1 (for "gain" from -1 to 1), or null. */
function tokenValue(window, position, color) {
  const [measure, kind] = color.split("-");
  if (measure === "entropy") return Math.min(1, window.entropy[position] / 3);
  if (measure === "direct") return window.direct[kind]?.[position] ?? null;
  const accuracy = (when) => {
    const group = groupsAt.get(`${when} ${window.split} ${window.window} ${position}`);
    return group ? mean(group.samples.map((sample) => Number(isCorrect(sample)))) : null;
  };
  if (measure === "reasoning") return accuracy(kind);
  const values = [accuracy("before"), accuracy("after")];
  return values.includes(null) ? null : values[1] - values[0];
}

function showLegend(color) {
  const stops = {
    entropy: ENTROPY_STOPS,
    gain: [["worse", -1], ["same", 0], ["better", 1]],
  }[color] ?? (color.startsWith("direct") ? RIGHT_STOPS : [["0 % of samples right", 0], ["50 %", 0.5], ["100 %", 1]]);
  byId("legend").replaceChildren(...swatches(stops, color));
}

function showWindow() {
  const window = run().windows[Number(byId("window").value || 0)];
  const color = byId("color").value;
  showLegend(color);
  byId("position").replaceChildren();
  if (!window) {
    byId("document").replaceChildren("This run has no evaluated text to show.");
    return;
  }
  const tokens = window.tokens.map((text, position) => {
    const group = ["after", "before"].map((kind) => groupsAt.get(`${kind} ${window.split} ${window.window} ${position}`)).find(Boolean);
    const background = tokenColor(tokenValue(window, position, color), color);
    const style = background ? `background-color: ${background}` : undefined;
    if (!group) return element("span", { style }, text);
    const button = element("button", { type: "button", style, "aria-pressed": "false", title: `${window.entropy[position]} nats` }, text || " ");
    button.addEventListener("click", () => {
      byId("document").querySelector('[aria-pressed="true"]')?.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", "true");
      showPosition(window, position);
    });
    return button;
  });
  byId("document").replaceChildren(...tokens);
}

/** Shows the rollouts at a position before and after training. */
function showPosition(window, position) {
  const parts = [];
  for (const [kind, title] of [["after", "Latest evaluation"], ["before", "First evaluation"]]) {
    const group = groupsAt.get(`${kind} ${window.split} ${window.window} ${position}`);
    if (!group) continue;
    const part = element("div");
    showGroup(part, group);
    if (parts.length) part.querySelector(".context").remove();
    parts.push(element("h3", {}, `${title}: ${group.samples.filter(isCorrect).length} of ${group.samples.length} samples right`), part);
  }
  byId("position").replaceChildren(...parts);
  if (matchMedia("(max-width: 760px)").matches) byId("position").scrollIntoView();
}

function chooseRun() {
  groupsAt = new Map(run().groups.map((group) => [`${group.kind} ${group.split} ${group.window} ${group.position}`, group]));
  const options = run().windows.map((window, i) => element("option", { value: i }, `${window.split.replace("_", " ")} ${window.window}: ${window.tokens.join("").slice(0, 40)}`));
  byId("window").replaceChildren(...options);
  applyFilters();
  showWindow();
}

function step(by) {
  const choice = byId("window");
  choice.selectedIndex = Math.min(choice.options.length - 1, Math.max(0, choice.selectedIndex + by));
  showWindow();
}

// --- config, live refresh and start --------------------------------------------------------------------

function filterFields() {
  const word = byId("field-search").value.toLowerCase();
  const onlyChanged = byId("field-changed").checked;
  for (const row of byId("fields").tBodies[0].rows) {
    row.hidden = !row.textContent.toLowerCase().includes(word) || (onlyChanged && !word && row.dataset.shown === "0");
  }
}

/** Loads the page again when its server has a newer one. */
function watch() {
  let known = null;
  setInterval(async () => {
    try {
      const version = await (await fetch("version")).text();
      if (known !== null && version !== known) location.reload();
      known = version;
    } catch {
      // The server has ended; the page stays as it is.
    }
  }, 5000);
}

startTheme();
byId("metric-search").addEventListener("input", listMetrics);
byId("metric-reset").addEventListener("click", resetMetrics);
filters.addEventListener("input", applyFilters);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(applyFilters));
byId("groups").addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  if (found[selected + by]) {
    if (!byId(`item-${selected + by}`)) listGroups(selected + by);
    select(selected + by);
  }
});
byId("color").addEventListener("change", showWindow);
byId("window").addEventListener("change", showWindow);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("run")?.addEventListener("change", chooseRun);
byId("field-search").addEventListener("input", filterFields);
byId("field-changed").addEventListener("change", filterFields);

fillChoices();
chooseRun();
filterFields();
resetMetrics();
drawScaling();
drawThroughput();
if (DATA.live) watch();
