// The page: choose a photograph, send it, show the ranking. No framework, no outside resource.

import { $, ask, contentOf, element, percent, sentence } from "./api.js";
import { enableSearch, showConcepts, showNeighbours } from "./findings.js";

const NUM_SHOWN = 8;
// For a model that has no class list of its own.
const EXAMPLE_CONDITIONS = [
  "melanoma", "melanocytic nevus", "basal cell carcinoma", "squamous cell carcinoma", "actinic keratosis",
  "seborrheic keratosis", "psoriasis", "atopic dermatitis", "acne vulgaris", "rosacea", "tinea corporis", "vitiligo",
];

const state = {
  file: null,
  previewUrl: null,
  own: [],
  conditions: [],
  model: null,
  ranking: [],
  showAll: false,
  request: null,
};

// ---- the model ----

async function loadModels() {
  let models;
  try {
    models = (await contentOf(await ask("v1/models"))).data;
  } catch {
    $("model-name").textContent = "not reachable";
    $("health").className = "dot down";
    return;
  }
  const picker = $("picker");
  picker.replaceChildren(...models.map((model, at) => new Option(spell(model.model_info), at)));
  picker.hidden = models.length < 2;
  $("model-name").hidden = models.length > 1;
  picker.onchange = () => useModel(models[picker.value]);
  useModel(models[0]);
  checkReady();
}

function useModel(model) {
  const rerank = state.model !== null && state.file !== null;
  const info = model.model_info;
  state.model = model;
  $("model-name").textContent = spell(info);
  $("model").title = `weights ${info.digest}`;
  $("lineage").textContent =
    `${spell(info)} · weights ${info.digest.slice(0, 12)} · preprocessing ${info.preprocessing_digest.slice(0, 12)}`;
  state.own = model.classes;
  setConditions(state.own.length ? state.own : EXAMPLE_CONDITIONS, { edited: false });
  enableSearch(model.can_search, () => state.model.id);
  if (rerank) rank();
}

function spell(info) {
  const version = info.version ? ` v${info.version}` : "";
  const alias = info.alias ? ` @${info.alias}` : "";
  return info.name + version + alias;
}

async function checkReady() {
  const answer = await fetch("readyz").catch(() => null);
  $("health").className = answer && answer.ok ? "dot ready" : "dot down";
}

// ---- candidate conditions ----

function setConditions(names, { edited = true } = {}) {
  state.conditions = [...new Set(names.map((name) => name.trim()).filter(Boolean))];
  $("count").textContent = state.conditions.length;
  $("chips").replaceChildren(...state.conditions.map(chip));
  $("results").classList.toggle("stale", edited && state.ranking.length > 0);
  updateAgain();
}

function chip(name) {
  const item = element("li");
  const remove = element("button", "", "×");
  remove.type = "button";
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.addEventListener("click", () => {
    const position = state.conditions.indexOf(name);
    setConditions(state.conditions.filter((other) => other !== name));
    const buttons = $("chips").querySelectorAll("button");
    (buttons[Math.min(position, buttons.length - 1)] ?? $("condition")).focus();
  });
  item.append(element("span", "", name), remove);
  return item;
}

function updateAgain() {
  $("again").disabled = !state.file || state.conditions.length === 0;
}

function addConditions(text) {
  const names = text.includes("\n") ? text.split("\n") : text.split(/[,;]/);
  setConditions([...names, ...state.conditions]);
}

// ---- the photograph ----

function choose(file) {
  if (!file) return;
  state.file = file;
  if (state.previewUrl) URL.revokeObjectURL(state.previewUrl);
  state.previewUrl = URL.createObjectURL(file);
  $("preview").src = state.previewUrl;
  $("preview").hidden = false;
  $("prompt").hidden = true;
  $("photo").classList.add("filled");
  $("file-name").textContent = `${file.name || "pasted image"} · ${size(file.size)} · choose another at any time`;
  updateAgain();
  rank();
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function withoutPreview() {
  $("preview").hidden = true;
  $("prompt").hidden = false;
  $("photo").classList.remove("filled");
}

// ---- asking and showing ----

async function rank() {
  if (state.conditions.length === 0) {
    showError("Add at least one condition to rank.");
    return;
  }
  state.request?.abort();
  const request = (state.request = new AbortController());
  const form = new FormData();
  form.append("image", state.file);
  form.append("labels", JSON.stringify(state.conditions));
  form.append("model", state.model.id);
  busy(true);
  const started = performance.now();
  for (const id of ["concepts", "neighbours"]) $(id).hidden = true;
  try {
    const answer = await ask("v1/classify", { method: "POST", body: form, signal: request.signal });
    showRanking(await contentOf(answer), performance.now() - started, answer.headers.get("Server-Timing"));
  } catch (error) {
    if (error.name === "AbortError") return;
    showError(sentence(error));
    if (state.request === request) busy(false);
    return;
  }
  await beside(request);
  if (state.request === request) busy(false);
}

// What is shown beside the ranking: when one of it fails, the ranking stands all the same.
async function beside(request) {
  const tasks = [showConcepts(state.file, state.model.id, request.signal)];
  if (state.model.can_search) tasks.push(showNeighbours(state.file, state.model.id, request.signal));
  await Promise.allSettled(tasks);
}

function busy(on) {
  $("photo").classList.toggle("busy", on);
  $("results").classList.toggle("busy", on);
  $("results").setAttribute("aria-busy", String(on));
}

function showError(message) {
  state.ranking = [];
  $("error").textContent = message;
  $("error").hidden = false;
  for (const id of ["ranking", "groups", "more", "foot", "empty"]) $(id).hidden = true;
  $("elapsed").textContent = "";
  $("status").textContent = "";
}

function showRanking(content, elapsedMs, timing) {
  state.ranking = content.ranking;
  state.showAll = false;
  $("error").hidden = true;
  $("empty").hidden = true;
  $("results").classList.remove("stale");
  $("ranking").hidden = false;
  const forward = timing?.match(/forward;dur=([\d.]+)/)?.[1];
  $("elapsed").textContent = `${Math.round(elapsedMs)} ms`;
  $("elapsed").title = forward ? `of which ${forward} ms in the model` : "";
  $("foot").textContent =
    `Answered by ${spell(content.model_info)}. Probabilities sum to 100 % over the ${content.ranking.length} candidates, so they depend on the list.`;
  $("foot").hidden = false;
  drawGroups(content.hierarchy);
  drawRanking();
  const top = content.ranking[0];
  $("status").textContent = `Most probable of ${content.ranking.length}: ${top.label}, ${percent(top.probability)}.`;
}

// The top level of the disease tree, where it parts the candidates at all.
function drawGroups(hierarchy) {
  const groups = hierarchy.filter((node) => node.level === 1);
  $("groups").hidden = groups.length < 2;
  $("groups").replaceChildren(...groups.map((node) => {
    const item = element("li", "", node.node.split(",")[0]);
    item.append(element("b", "", percent(node.probability)));
    return item;
  }));
}

function drawRanking() {
  const shown = state.showAll ? state.ranking : state.ranking.slice(0, NUM_SHOWN);
  $("ranking").replaceChildren(...shown.map(row));
  const more = $("more");
  more.hidden = state.ranking.length <= NUM_SHOWN;
  more.textContent = state.showAll ? "Show fewer" : `Show all ${state.ranking.length}`;
}

function row(ranked) {
  const item = element("li");
  item.append(element("span", "label", ranked.label), element("span", "value", percent(ranked.probability)));
  // A node's name lists its synonyms after commas.
  const above = (ranked.path ?? []).slice(0, -1).map((node) => node.split(",")[0]);
  if (above.length) item.append(element("span", "path", above.join(" › ")));
  const track = element("div", "track");
  const fill = element("div", "fill");
  fill.style.width = "0";
  track.append(fill);
  item.append(track);
  requestAnimationFrame(() => (fill.style.width = `${100 * ranked.probability}%`));
  return item;
}

// ---- events ----

$("file").addEventListener("change", (event) => {
  choose(event.target.files[0]);
  // So that choosing the same file again is a change too.
  event.target.value = "";
});
$("preview").addEventListener("error", withoutPreview);
$("more").addEventListener("click", () => {
  state.showAll = !state.showAll;
  drawRanking();
});
$("again").addEventListener("click", rank);
$("clear").addEventListener("click", () => setConditions([]));
$("reset").addEventListener("click", () => setConditions(state.own.length ? state.own : EXAMPLE_CONDITIONS));
$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  addConditions($("condition").value);
  $("condition").value = "";
});
$("condition").addEventListener("paste", (event) => {
  const text = event.clipboardData.getData("text");
  if (!text.includes("\n")) return;
  event.preventDefault();
  addConditions(text);
});
document.addEventListener("paste", (event) => {
  choose([...event.clipboardData.files].find((file) => file.type.startsWith("image/")));
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("photo").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}

loadModels();
