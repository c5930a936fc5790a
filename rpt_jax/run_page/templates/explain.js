// The page of a text: entropies, direct predictions, and responses at the chosen positions.
"use strict";

const { windows: WINDOWS, groups: GROUPS } = JSON.parse(document.getElementById("data").textContent);
const LEGENDS = {
  entropy: ENTROPY_STOPS,
  direct: RIGHT_STOPS,
  probability: [["0 %", 0], ["50 %", 0.5], ["100 %", 1]],
  reasoning: [["0 % of samples right", 0], ["50 %", 0.5], ["100 %", 1]],
};

const indexAt = new Map(GROUPS.map((group, i) => [`${group.window} ${group.position}`, i]));
let selected = -1;

const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const right = (group) => group.samples.filter(isCorrect).length;
const number = (group) => WINDOWS[group.window].start + group.position;

// --- text ----------------------------------------------------------------------------------------------

function tokenValue(window, position, color) {
  if (color === "entropy") return Math.min(1, window.entropy[position] / 3);
  if (color === "direct") return window.right[position];
  if (color === "probability") return window.probability[position];
  const index = indexAt.get(`${window.window} ${position}`);
  return index === undefined ? null : right(GROUPS[index]) / GROUPS[index].samples.length;
}

function describe(window, position) {
  return `token ${window.start + position}, ${window.entropy[position]} nats; directly: ${literal(window.likeliest[position])}, probability of the truth ${percent(window.probability[position])}`;
}

function showWindow() {
  const window = WINDOWS[Number(byId("window").value)];
  const color = byId("color").value;
  byId("legend").replaceChildren(...swatches(LEGENDS[color], color));
  const tokens = window.tokens.map((text, position) => {
    const background = tokenColor(tokenValue(window, position, color), color);
    const style = background ? `background-color: ${background}` : undefined;
    const title = describe(window, position);
    const index = indexAt.get(`${window.window} ${position}`);
    if (index === undefined) return element("span", { style, title }, text);
    const button = element("button", { type: "button", style, title, id: `token-${index}`, "aria-pressed": String(index === selected) }, text || " ");
    button.addEventListener("click", () => select(index));
    return button;
  });
  byId("document").replaceChildren(...tokens);
}

/** Shows a position: its responses, its token in the text, and its row of the table. */
function select(index, scroll = true) {
  const group = GROUPS[index];
  if (!group) return;
  selected = index;
  const window = WINDOWS[group.window];
  if (Number(byId("window").value) !== group.window) byId("window").value = String(group.window);
  showWindow();
  const responses = element("div");
  showGroup(responses, group);
  byId("position").replaceChildren(
    element("h3", {}, `Token ${number(group)}: ${right(group)} of ${group.samples.length} responses right`),
    element(
      "p", {}, "Directly ", element("code", { class: "literal" }, literal(window.likeliest[group.position])),
      `, ${window.right[group.position] ? "right" : "wrong"}; probability of the truth ${percent(window.probability[group.position])}`,
    ),
    responses,
  );
  if (scroll) byId(`token-${index}`).scrollIntoView({ block: "nearest" });
}

// --- table and charts ----------------------------------------------------------------------------------

function listPositions() {
  byId("positions-table").tBodies[0].append(
    ...GROUPS.map((group, i) => {
      const window = WINDOWS[group.window];
      const open = element("button", { type: "button" }, String(number(group)));
      open.addEventListener("click", () => {
        select(i);
        byId("text").scrollIntoView();
      });
      const cells = [
        element("code", { class: "literal" }, literal(group.truth)), window.entropy[group.position].toFixed(2),
        element("code", { class: "literal" }, literal(window.likeliest[group.position])), percent(window.probability[group.position]),
        `${right(group)} of ${group.samples.length}`,
      ];
      return element("tr", {}, element("td", {}, open), ...cells.map((cell) => element("td", {}, cell)));
    }),
  );
}

function drawCharts() {
  const entropy = WINDOWS.flatMap((window) => window.entropy);
  const truths = WINDOWS.flatMap((window) => window.tokens);
  const chosen = GROUPS.map(number);
  const style = { xaxis: { title: { text: "token" } }, hovermode: "closest", margin: { l: 60, r: 15, t: 38, b: 60 } };
  plot(byId("entropy-chart"), "Entropy along the text (nats)", [
    { x: entropy.map((_, i) => i), y: entropy, text: truths.map((text) => label(literal(text))), type: "bar", marker: { color: "#e07b00" }, name: "all tokens", hovertemplate: "token %{x} %{text}: %{y} nats<extra></extra>" },
    { x: chosen, y: chosen.map((token) => entropy[token]), mode: "markers", marker: { color: "#1f77b4", size: 8 }, name: "chosen positions", hoverinfo: "skip" },
  ], style);
  const names = GROUPS.map((group) => label(`${number(group)} ${literal(group.truth)}`));
  plot(byId("reasoning-chart"), "Chosen positions: the true token", [
    { x: names, y: GROUPS.map((group) => WINDOWS[group.window].probability[group.position]), type: "bar", marker: { color: "#8a6d3b" }, name: "probability, directly" },
    { x: names, y: GROUPS.map((group) => right(group) / group.samples.length), type: "bar", marker: { color: "#2a9d6f" }, name: "right by reasoning" },
  ], { ...style, xaxis: { type: "category" }, yaxis: { tickformat: ".0%", range: [0, 1] } });
}

// --- start ---------------------------------------------------------------------------------------------

startTheme();
byId("window").append(...WINDOWS.map((window) => element("option", { value: window.window }, `${window.window + 1} of ${WINDOWS.length}`)));
byId("color").addEventListener("change", showWindow);
byId("window").addEventListener("change", showWindow);
byId("previous").addEventListener("click", () => select(selected - 1));
byId("next").addEventListener("click", () => select(selected + 1));
byId("document").addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowRight: 1, j: 1, ArrowUp: -1, ArrowLeft: -1, k: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  select(selected + by);
});
listPositions();
drawCharts();
select(GROUPS.reduce((best, group, i) => (group.entropy > GROUPS[best].entropy ? i : best), 0), false);
