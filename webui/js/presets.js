// Presets: first frames that ship with the page, each with a prompt, chosen by the served model.

import { h } from "./dom.js";

const IMAGE_TIMEOUT_MS = 20_000;

/** The presets for a model: those that name it, or else those that name no model. */
export function presetsFor(presets, modelId) {
  const own = presets.filter(({ models }) => models?.some((pattern) => modelId.includes(pattern)));
  return own.length ? own : presets.filter(({ models }) => !models);
}

export async function loadPresets() {
  const answer = await fetch("presets/presets.json");
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

/** A preset's image as a Blob. Throws if it cannot be loaded. */
export async function presetImage(preset) {
  const answer = await fetch(`presets/${preset.picture}`, { signal: AbortSignal.timeout(IMAGE_TIMEOUT_MS) });
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
