// Places to begin: small pictures that ship with the page, each with its words, chosen by the served model.

import { h } from "./dom.js";

const PICTURE_TIMEOUT_MS = 20_000;

/** The presets for a model: those that name it, else those for any. */
export function presetsFor(catalog, modelId) {
  const own = catalog.filter(({ models }) => models?.some((pattern) => modelId.includes(pattern)));
  return own.length ? own : catalog.filter(({ models }) => !models);
}

export async function loadCatalog() {
  const answer = await fetch("presets/presets.json");
  return answer.json();
}

/** The bytes of a preset's picture. Throws where they cannot be had. */
export async function presetPicture(preset) {
  const answer = await fetch(`presets/${preset.picture}`, { signal: AbortSignal.timeout(PICTURE_TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.blob();
}

export function presetButtons(presets, onChoose) {
  return presets.map((preset) =>
    h(
      "button",
      { className: "preset", "data-preset": preset.id, "aria-pressed": "false", onclick: () => onChoose(preset) },
      h("img", { src: `presets/${preset.picture}`, alt: "", width: 160, height: 96, decoding: "async" }),
      h("span", { textContent: preset.name }),
    ),
  );
}

export function markPreset(root, id) {
  for (const button of root.children) button.setAttribute("aria-pressed", String(button.dataset.preset === id));
}
