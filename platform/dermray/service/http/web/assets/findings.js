// Beside the ranking: clinical concepts as chips, the nearest images of the corpus, and search by words.

import { $, ask, contentOf, element, percent, post, sentence } from "./api.js";

const NUM_CONCEPTS = 12;
const NUM_NEIGHBOURS = 8;
const NUM_FOUND = 12;

// ---- concepts ----

export async function showConcepts(file, model, signal) {
  const form = new FormData();
  form.append("image", file);
  form.append("model", model);
  const content = await contentOf(await ask("v1/concepts", { method: "POST", body: form, signal }));
  $("concept-list").replaceChildren(...content.concepts.slice(0, NUM_CONCEPTS).map(conceptChip));
  $("concepts").hidden = false;
}

function conceptChip(presence) {
  const item = element("li");
  // Four steps of strength, as classes: the content policy allows no styles from here but through the object model.
  item.className = `strength-${Math.min(3, Math.floor(4 * presence.score))}`;
  item.append(element("span", "", presence.concept), element("b", "", percent(presence.score)));
  return item;
}

// ---- neighbours ----

export async function showNeighbours(file, model, signal) {
  const image = await asDataUri(file);
  const answer = await post("v1/search", { image, k: NUM_NEIGHBOURS, model }, signal);
  drawHits($("neighbour-list"), (await contentOf(answer)).data);
  $("neighbours").hidden = false;
}

function asDataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.replace(/^data:[^;]*/, "data:image/jpeg")));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

function drawHits(list, hits) {
  list.replaceChildren(...hits.map(hitCard));
}

function hitCard(hit) {
  const item = element("li");
  const label = hit.labels.map((name) => name.split(",")[0]).join(", ") || "no label";
  if (hit.thumbnail) {
    const picture = element("img");
    picture.src = hit.thumbnail;
    picture.alt = hit.caption ?? label;
    picture.loading = "lazy";
    item.append(picture);
  }
  item.append(element("span", "label", label), element("span", "value", hit.score.toFixed(2)));
  item.title = hit.caption ?? hit.sample_id;
  return item;
}

// ---- search by words ----

export function enableSearch(can, modelOf) {
  $("search").hidden = !can;
  $("search-form").onsubmit = async (event) => {
    event.preventDefault();
    const query = $("query").value.trim();
    if (!query) return;
    $("search").setAttribute("aria-busy", "true");
    $("search-error").hidden = true;
    try {
      const answer = await post("v1/search", { query, k: NUM_FOUND, model: modelOf() });
      const hits = (await contentOf(answer)).data;
      drawHits($("found"), hits);
      $("search-status").textContent = `${hits.length} images nearest to “${query}”, by cosine`;
    } catch (error) {
      $("found").replaceChildren();
      $("search-status").textContent = "";
      $("search-error").textContent = sentence(error);
      $("search-error").hidden = false;
    }
    $("search").setAttribute("aria-busy", "false");
  };
}
