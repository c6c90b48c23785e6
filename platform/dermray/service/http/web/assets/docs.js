// The API reference, drawn from openapi.json: endpoints, fields, examples that can be pasted into a shell.

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function resolve(schema, document) {
  const name = schema?.$ref?.split("/").pop();
  return name ? document.components.schemas[name] : (schema ?? {});
}

function typeOf(schema, document) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(one, document)).join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {}, document)}`;
  return schema.format === "binary" ? "file" : (schema.type ?? "any");
}

function table(schema, document) {
  const body = element("tbody");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const required = (schema.required ?? []).includes(name);
    body.append(
      element(
        "tr", "",
        element("td", "", element("code", "", name)),
        element("td", "type", typeOf(field, document) + (required ? ", required" : "")),
        element("td", "", field.description ?? ""),
      ),
    );
  }
  return element("table", "", body);
}

const IMAGE = /data:image\/[a-z]+;base64,[A-Za-z0-9+/=]+/;

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

// An image goes through a pipe: a shell takes no argument as long as a photograph.
function curl(method, path, example, administrative) {
  const url = `${location.origin}${location.pathname.replace(/\/docs\/?$/, "")}${path}`;
  const token = administrative ? ` \\\n  -H "Authorization: Bearer $DERMRAY_SERVE_ADMIN_TOKENS"` : "";
  if (!example) return `curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${url}${token}`;
  const body = JSON.stringify(example);
  const send = `curl ${url} \\\n  -H 'Content-Type: application/json'${token} \\\n  -d `;
  if (!IMAGE.test(body)) return send + quote(body);
  const [before, after] = body.split(IMAGE);
  return `{ printf %s ${quote(`${before}data:image/jpeg;base64,`)}\n` +
    `  base64 < photo.jpg | tr -d '\\n'; printf %s ${quote(after)}; } |\n${send}@-`;
}

function operation(path, method, detail, document) {
  const card = element(
    "section", "card",
    element("h2", "operation", element("span", "method", method.toUpperCase()), element("code", "", path)),
    element("p", "", element("strong", "", detail.summary ?? ""), " ", detail.description ?? ""),
  );
  const bodies = Object.entries(detail.requestBody?.content ?? {});
  for (const [mediaType, content] of bodies) {
    card.append(element("h3", "", mediaType), table(resolve(content.schema, document), document));
  }
  const examples = bodies.flatMap(([, content]) => resolve(content.schema, document).examples ?? []);
  card.append(element("h3", "", "Example"));
  const administrative = (detail.tags ?? []).includes("administration");
  for (const example of examples.length ? examples.slice(0, 2) : [null]) {
    card.append(element("pre", "", element("code", "", curl(method, path, example, administrative))));
  }
  const answers = element("tbody");
  for (const [status, answer] of Object.entries(detail.responses)) {
    if (status !== "422" || bodies.length) {
      answers.append(element("tr", "", element("td", "", element("code", "", status)), element("td", "", answer.description)));
    }
  }
  card.append(element("h3", "", "Answers"), element("table", "", answers));
  const success = resolve(detail.responses["200"]?.content?.["application/json"]?.schema, document);
  if (success.properties) card.append(element("h3", "", "Fields of the answer"), table(success, document));
  return card;
}

const answer = await fetch("openapi.json");
const specification = await answer.json();
document.getElementById("description").textContent = specification.info.description;
for (const [path, methods] of Object.entries(specification.paths)) {
  for (const [method, detail] of Object.entries(methods)) {
    document.getElementById("operations").append(operation(path, method, detail, specification));
  }
}
