// What all pages have in common: theme, plots, rollouts of a prompt. Everything from a run is inserted as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);

/** Returns an element with text and children; names of attributes that are not given are left out. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Returns text that Plotly, which reads some HTML in labels, shows as it is. */
function label(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** Returns text as a literal, so that spaces and line feeds are visible. */
const literal = (text) => (text === null ? "none" : JSON.stringify(text));

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// --- theme ---------------------------------------------------------------------------------------------

/** Reads or writes what the browser remembers of this page; it may refuse for a page that is opened from disk. */
function remembered(key, value) {
  try {
    if (value !== undefined) sessionStorage.setItem(key, value);
    return sessionStorage.getItem(key);
  } catch {
    return value ?? null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(chart, themed());
}

/** Takes the theme that was chosen before, or that of the system, and lets the button change it. */
function startTheme() {
  setTheme(remembered("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(remembered("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark")));
}

/** Returns the colors of a plot in the page's theme. */
function themed() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name));
  const axes = {};
  for (const axis of ["xaxis", "yaxis"]) Object.assign(axes, { [`${axis}.gridcolor`]: line, [`${axis}.linecolor`]: line, [`${axis}.zerolinecolor`]: line });
  return { "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", ...axes };
}

// --- plots ---------------------------------------------------------------------------------------------

function plot(target, title, traces, layout = {}) {
  const base = {
    title: { text: title, font: { size: 13 }, x: 0.02, xanchor: "left" },
    font: { size: 11 }, margin: { l: 55, r: 15, t: 38, b: 38 }, showlegend: traces.some((trace) => trace.showlegend !== false && trace.name),
    legend: { orientation: "h", y: -0.28, yanchor: "top" }, hovermode: "x", xaxis: { title: { text: "step", standoff: 4 } }, yaxis: { rangemode: "tozero" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // A finger scrolls the page.
  };
  const config = { responsive: true, displayModeBar: false };
  return Plotly.newPlot(target, traces, { ...base, ...layout }, config).then(() => Plotly.relayout(target, themed()));
}

// --- rollouts ------------------------------------------------------------------------------------------

const isCorrect = (sample) => sample.status === "correct";

function place(group) {
  return group.position < 0 ? `question ${group.source}` : `document ${group.source}, position ${group.position}`;
}

/** Shows the context, the truth and all samples of a prompt. */
function showGroup(target, group) {
  const facts = [group.step === null ? null : `step ${group.step}`, place(group), group.split.replace("_", " "), group.entropy === null ? null : `entropy ${group.entropy.toFixed(3)} nats`];
  const context = element("div", { class: "context" }, group.context);
  target.replaceChildren(
    element("p", { class: "hint" }, facts.filter(Boolean).join(" · ")),
    context,
    element("p", {}, "Truth ", element("code", { class: "literal truth" }, literal(group.truth))),
    element("div", { class: "samples" }, ...group.samples.map(sampleCard)),
  );
  context.scrollTop = context.scrollHeight;
}

function sampleCard(sample) {
  const right = isCorrect(sample);
  const facts = [sample.status, `reward ${sample.reward}`, `${sample.length} tokens`, `log p ${sample.logprob}`];
  const rest = sample.answer !== null && sample.prediction === null ? element("pre", {}, sample.answer) : null;
  return element(
    "article",
    { class: right ? "sample right" : "sample" },
    element("p", { class: "facts" }, ...facts.map((fact) => element("span", {}, fact))),
    element("pre", {}, sample.reasoning),
    rest,
    element("p", { class: "facts" }, "prediction ", element("code", { class: right ? "literal" : "literal wrong" }, literal(sample.prediction))),
  );
}

// --- text ----------------------------------------------------------------------------------------------

function tokenColor(value, color) {
  if (value === null) return "";
  if (color === "entropy") return `rgba(230, 126, 0, ${0.75 * value})`;
  if (color === "gain") return value < 0 ? `rgba(214, 60, 80, ${-0.7 * value})` : `rgba(30, 160, 100, ${0.7 * value})`;
  return value > 0.5 ? `rgba(30, 160, 100, ${0.15 + 0.5 * (2 * value - 1)})` : `rgba(214, 60, 80, ${0.15 + 0.4 * (1 - 2 * value)})`;
}

const ENTROPY_STOPS = [["0 nats", 0], ["1.5", 0.5], ["3 and more", 1]];
const RIGHT_STOPS = [["wrong", 0], ["right", 1]];

/** Returns the parts of a legend: a swatch and a name for each value of what tokens are colored by. */
function swatches(stops, color) {
  return stops.flatMap(([name, value]) => [element("span", { class: "swatch", style: `background: ${tokenColor(value, color)}` }), name]);
}
