// What the page's head and its dialog say about the server.

import { $, h } from "./dom.js";

export function showServerFacts(server) {
  const { model } = server;
  $("server-chip").dataset.tone = server.tone;
  $("server-chip-text").textContent = server.status;
  const facts = model
    ? [
        ["Model", model.id],
        ["Device", model.device || "unknown"],
        ["State", server.status],
        ["Frame size", model.defaultSize.replace("x", " × ")],
      ]
    : [["State", server.status]];
  facts.unshift(["Address", server.base ?? server.address]);
  $("server-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]),
  );
}
