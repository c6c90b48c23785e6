// Asking the service: the token, the chosen model, and refusals in words.

// What to say for the refusals that a person meets; anything else shows the server's own sentence.
const EXPLANATIONS = {
  not_an_image: "This file is not an image. Use a JPEG, PNG or WebP photograph.",
  truncated: "This image is damaged or incomplete, so it cannot be read.",
  zero_byte: "This file is empty.",
  queue_full: "Many photographs are waiting just now. Try again in a moment.",
  model_unavailable: "The model is not answering just now. Try again in a moment.",
  index_of_another_model: "The index was made by another model, so it cannot be searched with this one.",
};
// Forgotten with the tab.
const TOKEN_KEY = "dermray-token";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

let asking = null;

// One dialog for all requests that wait for a token at the same time.
function askForToken(refused) {
  const dialog = $("token-dialog");
  $("token-refused").hidden = !refused;
  asking ??= new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(TOKEN_KEY, $("token").value.trim());
      $("token").value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export async function ask(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN_KEY);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    await askForToken(Boolean(token));
  }
}

export async function contentOf(answer) {
  const content = await answer.json();
  if (!answer.ok) throw new Error(EXPLANATIONS[content.error.code] ?? content.error.message);
  return content;
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export function sentence(error) {
  if (error instanceof TypeError) return "The server could not be reached, or the file is too large for it.";
  const text = error.message.replace(/^(image|query): /, "");
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export function percent(probability) {
  if (probability > 0 && probability < 0.001) return "< 0.1 %";
  return `${(100 * probability).toFixed(1)} %`;
}
