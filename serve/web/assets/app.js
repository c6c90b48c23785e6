// The page: choose a photograph, send it, show the ranking. No framework, no outside resource.

const NUM_SHOWN = 8;
// For a model that has no class list of its own.
const EXAMPLE_CONDITIONS = [
  "melanoma", "melanocytic nevus", "basal cell carcinoma", "squamous cell carcinoma", "actinic keratosis",
  "seborrheic keratosis", "psoriasis", "atopic dermatitis", "acne vulgaris", "rosacea", "tinea corporis", "vitiligo",
];

// What to say for the refusals that a person meets; anything else shows the server's own sentence.
const EXPLANATIONS = {
  not_an_image: "This file is not an image. Use a JPEG, PNG or WebP photograph.",
  truncated: "This image is damaged or incomplete, so it cannot be read.",
  zero_byte: "This file is empty.",
  queue_full: "Many photographs are waiting just now. Try again in a moment.",
  model_unavailable: "The model is not answering just now. Try again in a moment.",
};

const $ = (id) => document.getElementById(id);
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

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// ---- the model ----

async function loadModel() {
  try {
    const answer = await fetch("v1/models");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    state.model = (await answer.json()).data[0];
  } catch {
    $("model-name").textContent = "not reachable";
    $("health").className = "dot down";
    return;
  }
  const info = state.model.model_info;
  $("model-name").textContent = spell(info);
  $("model").title = `weights ${info.digest}`;
  $("lineage").textContent =
    `${spell(info)} · weights ${info.digest.slice(0, 12)} · preprocessing ${info.preprocessing_digest.slice(0, 12)}`;
  state.own = state.model.classes;
  setConditions(state.own.length ? state.own : EXAMPLE_CONDITIONS, { edited: false });
  checkReady();
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
  busy(true);
  const started = performance.now();
  try {
    const answer = await fetch("v1/classify", { method: "POST", body: form, signal: request.signal });
    const content = await answer.json();
    if (!answer.ok) throw new Error(EXPLANATIONS[content.error.code] ?? content.error.message);
    showRanking(content, performance.now() - started, answer.headers.get("Server-Timing"));
  } catch (error) {
    if (error.name === "AbortError") return;
    showError(error instanceof TypeError ? "The server could not be reached, or the file is too large for it." : sentence(error.message));
  }
  if (state.request === request) busy(false);
}

function sentence(message) {
  const text = message.replace(/^image: /, "");
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
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
  for (const id of ["ranking", "more", "foot", "empty"]) $(id).hidden = true;
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
  drawRanking();
  const top = content.ranking[0];
  $("status").textContent = `Most probable of ${content.ranking.length}: ${top.label}, ${percent(top.probability)}.`;
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

function percent(probability) {
  if (probability > 0 && probability < 0.001) return "< 0.1 %";
  return `${(100 * probability).toFixed(1)} %`;
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

loadModel();
