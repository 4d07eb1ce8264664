// The page: what is entered, what the API answers, and what is shown of it.

import * as api from "./api.js";
import { chip, html, shortened } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { aligned, cosines, groups, neighbours, principal } from "./geometry.js";
import { nearLists, table, words } from "./lists.js";
import { drawMap } from "./map.js";

const [LEAST, MOST] = [3, 50];
const $ = (id) => document.getElementById(id);
const fields = { texts: $("texts"), a: $("a"), b: $("b"), model: $("model"), key: $("key") };

let known = []; // models
let running = null; // AbortController of the comparison that is under way
let shown = null; // what the results are of: see `understood`

// -- what is entered -------------------------------------------------------------------------------------------

const entered = () => ({
  texts: fields.texts.value.split("\n").map((line) => line.trim()).filter(Boolean),
  instructions: [fields.a.value.trim(), fields.b.value.trim()],
  model: fields.model.value,
});

function fill({ texts, instructions, model }) {
  fields.texts.value = texts.join("\n");
  [fields.a.value, fields.b.value] = instructions;
  if (model && known.some((one) => one.id === model)) fields.model.value = model;
}

// The address holds everything that is needed to see the same, after the #, which no server gets.
function addressOf({ texts, instructions: [a, b], model }, text) {
  const parts = new URLSearchParams({ texts: texts.join("\n"), a, b, model, text: String(text + 1) });
  return `#${parts}`;
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("texts")) return null;
  return {
    texts: parts.get("texts").split("\n").filter((line) => line.trim()),
    instructions: [parts.get("a") || "", parts.get("b") || ""],
    model: parts.get("model") || "",
    text: Math.max(0, Number.parseInt(parts.get("text"), 10) - 1 || 0),
  };
}

function mistake({ texts, instructions }) {
  if (texts.length < LEAST) return [fields.texts, `Enter at least ${LEAST} texts, one a line.`];
  if (texts.length > MOST) return [fields.texts, `This page compares up to ${MOST} texts; there are ${texts.length}.`];
  const missing = instructions.findIndex((one) => !one);
  return missing < 0 ? null : [[fields.a, fields.b][missing], `Enter instruction ${"AB"[missing]}.`];
}

// -- messages --------------------------------------------------------------------------------------------------

// `quiet`: for screen readers alone, where the page shows the same.
function say(message, quiet = false) {
  $("status").textContent = message;
  $("status").classList.toggle("quiet", quiet);
}

function showError(message, field) {
  $("error").textContent = message;
  $("error").hidden = !message;
  for (const one of Object.values(fields)) one.removeAttribute("aria-invalid");
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

function failed(error) {
  say("");
  if (error.status === 401) {
    $("key-field").hidden = false;
    showError(error.message, fields.key);
  } else {
    showError(error instanceof api.ApiError ? error.message : `The page has failed: ${error.message}`);
  }
}

// -- what is computed ------------------------------------------------------------------------------------------

// Everything that is drawn, of the vectors under A and B.
function understood(input, vectors) {
  const views = vectors.map((of, side) => {
    const cosine = cosines(of);
    return {
      instruction: input.instructions[side],
      cosine,
      ranked: cosine.map((_, text) => neighbours(cosine, text)),
      parts: groups(cosine),
      ...principal(of),
    };
  });
  views[1].places = aligned(views[1].places, views[0].places);
  for (const view of views) view.first = view.ranked.map((ranked) => ranked[0]);
  const { label, order } = views[0].parts;
  return { ...input, views, label, order, selected: 0, tokens: [null, null] };
}

// A text whose nearest one differs, so that the first look shows a change.
function telling({ views }) {
  const differs = views[0].first.findIndex((first, text) => first !== views[1].first[text]);
  return Math.max(0, differs);
}

// -- what is shown ---------------------------------------------------------------------------------------------

const many = (count, one, several) => `${count} ${count === 1 ? one : several}`;

function headline({ texts, views }) {
  const changed = texts.filter((_, text) => views[0].first[text] !== views[1].first[text]).length;
  if (!changed) return "Every text has the same nearest text under A and B.";
  return `${changed} of ${texts.length} texts have another nearest text under B than under A.`;
}

function showMaps() {
  const focused = document.activeElement?.id;
  shown.views.forEach((view, side) => {
    const name = "ab"[side];
    const figure = $(`map-${name}`);
    const box = figure.querySelector(".picture") || figure.appendChild(html("div", { class: "picture" }));
    const drawn = { places: view.places, parts: view.parts.parts, nearest: view.ranked[shown.selected] };
    box.replaceChildren(drawMap(box, name, drawn, shown, select));
  });
  if (focused?.startsWith("map-")) $(focused)?.focus();
}

const named = (text) =>
  html("dd", {}, chip(text, shown.label[text]), html("bdi", {}, shown.texts[text]));

function showSelected() {
  const { texts, views, selected, label } = shown;
  $("selected").replaceChildren(chip(selected, label[selected]), " ", html("bdi", {}, texts[selected]));
  $("near-number").textContent = String(selected + 1);
  $("telling").replaceChildren(
    html("dt", {}, "Nearest to"), named(selected),
    ...views.flatMap((view, side) => [
      html("dt", {}, "under ", html("span", { class: "badge" }, "AB"[side])), named(view.first[selected])]),
  );
  const near = views.map((view) => ({ ...view, nearest: view.ranked[selected] }));
  $("near").replaceChildren(...nearLists(near, shown, select));
  $("table-a").replaceChildren(...table("a", views[0], views[1], shown, select));
  $("table-b").replaceChildren(...table("b", views[1], views[0], shown, select));
  showMaps();
}

function captioned(side) {
  const { views, label } = shown;
  const { parts } = views[side].parts;
  return html("figcaption", {},
    html("p", { class: "under" }, html("span", { class: "badge" }, "AB"[side]), " ",
      html("bdi", {}, views[side].instruction)),
    html("ul", { class: "groups", "aria-label": `${many(parts.length, "group", "groups")} of texts` },
      parts.map((part) => html("li", {}, part.map((text) => [
        html("span", { class: "hidden" }, `${text + 1} `), chip(text, label[text])])))));
}

function showResults(truncated) {
  $("headline").textContent = headline(shown);
  shown.views.forEach((view, side) => {
    $(`map-${"ab"[side]}`).replaceChildren(captioned(side), html("div", { class: "picture" }),
      html("p", { class: "hint" }, `The map holds ${Math.round(100 * view.share)} % of the variance.`));
  });
  $("notes").hidden = !truncated.length;
  $("notes").textContent = truncated.length
    ? `Longer than the model reads, and cut: text ${truncated.map((n) => n + 1).join(", ")}.` : "";
  $("results").hidden = false;
  showSelected();
  showWords();
}

function showWords() {
  shown.tokens.forEach((tokens, side) => {
    const box = $(`words-${"ab"[side]}`);
    if (tokens) box.replaceChildren(...words("ab"[side], shown.instructions[side], tokens, shown.tokens[1 - side]));
    else box.replaceChildren(html("p", { class: "hint" }, "Reading…"));
  });
}

// `focused`: id of what had the focus, and has it again when all is drawn anew.
function select(text, focused) {
  if (!shown || text < 0 || text >= shown.texts.length) return;
  shown.selected = text;
  showSelected();
  if (focused) $(focused)?.focus();
  const [a, b] = shown.views.map((view) => shown.texts[view.first[text]]);
  say(`Text ${text + 1} is selected. Nearest under A: ${shortened(a, 60)} Nearest under B: ${shortened(b, 60)}`, true);
  history.replaceState(null, "", addressOf(shown, text));
}

function step(by) {
  select((shown.selected + by + shown.texts.length) % shown.texts.length);
}

// -- what happens ----------------------------------------------------------------------------------------------

function busy(is) {
  $("results").setAttribute("aria-busy", String(is));
  $("compare").classList.toggle("waiting", is);
}

// Ask the API, and show what it answers. A comparison that is under way is dropped. `text`: to select.
async function compare({ text, address = true } = {}) {
  const input = entered();
  const wrong = mistake(input);
  if (wrong) return showError(wrong[1], wrong[0]);
  running?.abort();
  const mine = running = new AbortController();
  showError("");
  busy(true);
  say(`Reading ${input.texts.length} texts under 2 instructions…`);
  try {
    const key = fields.key.value;
    if (!known.length) await openModels(mine.signal);
    input.model ||= fields.model.value;
    const answer = await api.embeddings(input.model, input.texts, input.instructions, key, mine.signal);
    if (mine.signal.aborted) return;
    shown = understood(input, answer.vectors);
    shown.selected = text < input.texts.length ? text : telling(shown);
    if (address) {
      const now = addressOf(shown, shown.selected);
      if (now !== location.hash) history.pushState(null, "", now);
    }
    api.storeKey(key);
    showResults(answer.truncated);
    stale();
    say(`Done. ${headline(shown)}`, true);
    await explain(shown, key, mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
}

// The words come later than the maps, and their failure does not take these away.
async function explain(of, key, signal) {
  await Promise.all(of.instructions.map(async (instruction, side) => {
    try {
      of.tokens[side] = await api.explain(of.model, instruction, key, signal);
      if (shown === of) showWords();
    } catch (error) {
      if (error.name === "AbortError" || shown !== of) return;
      $(`words-${"ab"[side]}`).replaceChildren(html("p", { class: "hint" }, error.message));
    }
  }));
}

async function openModels(signal) {
  known = await api.models(fields.key.value, signal);
  fields.model.replaceChildren(...known.map((one) => html("option", { value: one.id }, one.id)));
  $("model-field").hidden = known.length < 2;
  const asked = fromAddress()?.model;
  if (known.some((one) => one.id === asked)) fields.model.value = asked;
}

// Whether the results are still those of what is entered.
function stale() {
  const now = entered();
  const differs = !shown || ["texts", "instructions", "model"].some((name) => String(now[name]) !== String(shown[name]));
  $("compare").classList.toggle("stale", Boolean(shown) && differs);
  $("results").classList.toggle("stale", Boolean(shown) && differs);
}

async function copyLink() {
  const link = new URL(addressOf(entered(), shown ? shown.selected : 0), location.href).href;
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied. It holds the texts and the instructions.");
  } catch {
    say("The link is in the address bar. It holds the texts and the instructions.");
  }
}

function start() {
  const address = fromAddress();
  fill(address || EXAMPLES[0]);
  compare({ text: address?.text, address: false });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
$("form").addEventListener("input", stale);
for (const field of [fields.a, fields.b, fields.texts]) {
  field.addEventListener("keydown", (event) => {
    const sends = field === fields.texts ? event.ctrlKey || event.metaKey : !event.shiftKey;
    if (event.key !== "Enter" || event.isComposing || !sends) return;
    event.preventDefault();
    compare();
  });
}
fields.model.addEventListener("change", () => compare());
$("copy").addEventListener("click", copyLink);
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("examples").append(...EXAMPLES.map((example) => html(
  "button",
  { type: "button", onclick: () => { fill(example); compare(); } },
  example.name,
)));
window.addEventListener("popstate", start);
// Maps are drawn for their width.
new ResizeObserver(() => shown && requestAnimationFrame(showMaps)).observe($("map-a"));

fields.key.value = api.storedKey();
start();
