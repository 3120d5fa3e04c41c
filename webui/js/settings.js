// The advanced settings: a table with label, unit, range and help per field, and their storage in the browser.

const KEY = "lingbot-rt.settings";

const FORMAT_NAMES = {
  webp: "WebP: small",
  jpeg: "JPEG: fast to encode",
  raw: "Raw: lossless, very large",
  "delta-gzip": "Delta gzip: lossless, large",
};

/**
 * The fields for a model, each {key, group, label, unit, help, kind, ...}. `kind` is number (min, max, step), choice
 * (options [[value, label]]), text or switch. `fallback` is the default; `optional` numbers may be empty. A field
 * with `when` applies only if when(values) is true. Fields with `isLocal` are not sent to the server.
 */
export function fieldsFor(model) {
  const latentFrames = { group: "Memory", unit: "latent frames", kind: "number", min: 0, max: 64, step: 1 };
  const fields = [
    {
      key: "size", group: "Video", label: "Size", unit: "pixels", kind: "choice", fallback: model.defaultSize,
      options: model.sizes.map((size) => [size, size.replace("x", " × ")]),
      help: "Width and height of the frames. Larger frames take longer.",
    },
    {
      key: "fps", group: "Video", label: "Frame rate", unit: "frames/s", kind: "number", step: 1,
      min: model.fps.min, max: model.fps.max, fallback: model.fps.default,
      help: "Frames per second of video.",
    },
    {
      key: "num_frames", group: "Video", label: "Chunk length", unit: "frames", kind: "choice",
      fallback: model.frames.default, options: model.frames.choices.map((count) => [count, String(count)]),
      help:
        `Frames in the first chunk. Later chunks have 3 more. The model was trained with ${model.frames.default}. ` +
        "Shorter chunks react sooner.",
    },
    {
      key: "num_inference_steps", group: "Video", label: "Denoising steps", unit: "steps", kind: "number", step: 1,
      min: 1, max: Math.min(model.steps.max, model.steps.default), fallback: model.steps.default,
      help: "Denoising steps per chunk. Fewer steps are faster and show less detail.",
    },
    {
      key: "realtime_output_format", group: "Transport", label: "Format", kind: "choice",
      fallback: model.formats.includes("webp") ? "webp" : model.formats[0],
      options: model.formats.map((format) => [format, FORMAT_NAMES[format] ?? format]),
      help: "How the server encodes the frames.",
    },
    {
      key: "output_compression", group: "Transport", label: "Quality", unit: "1 to 100", kind: "number", step: 1,
      min: 1, max: 100, fallback: 92, when: (values) => ["webp", "jpeg"].includes(values.realtime_output_format),
      help: "Quality of WebP and JPEG. Lower quality needs less bandwidth.",
    },
    {
      key: "realtime_preview_max_width", group: "Transport", label: "Maximum width", unit: "pixels", kind: "number",
      step: 16, min: 16, max: 4096, optional: true,
      when: (values) => ["webp", "jpeg"].includes(values.realtime_output_format),
      help: "The server shrinks wider frames before it sends them. Empty: full size.",
    },
    {
      key: "playback", group: "Transport", label: "Playback", kind: "choice", fallback: "low-latency", isLocal: true,
      options: [["low-latency", "Low latency"], ["smooth", "Smooth: larger buffer"]],
      help: "How much video is buffered. Smooth suits unsteady networks.",
    },
    {
      key: "realtime_output_pacing", group: "Transport", label: "Real-time pacing", kind: "switch", fallback: true,
      help: "The server does not generate ahead of playback. Keys take effect sooner.",
    },
    {
      key: "realtime_causal_sink_size", label: "Sink size", optional: true, placeholder: model.sink, ...latentFrames,
      help: "How much of the session's start always stays in the K/V cache. Empty: the model's default.",
    },
    {
      key: "realtime_causal_kv_cache_num_frames", label: "Window size", optional: true, placeholder: model.window,
      ...latentFrames, help: "How much the K/V cache holds in all, the sink included. Empty: the model's default.",
    },
    {
      key: "max_chunks", group: "Session", label: "Stop after", unit: "chunks", kind: "number", min: 1, max: 100000,
      step: 1, optional: true, help: "The session ends after this many chunks. Empty: no limit.",
    },
  ];
  if (model.hasGuidance) {
    fields.push(
      {
        key: "guidance_scale", group: "Prompt", label: "Guidance scale", unit: "strength", kind: "number", min: 1,
        max: 15, step: 0.5, fallback: 1,
        help: "How closely the video follows the prompt. 1: no guidance. Above 1, each chunk takes twice as long.",
      },
      {
        key: "negative_prompt", group: "Prompt", label: "Negative prompt", kind: "text", fallback: "",
        maxLength: model.maxPromptCharacters,
        when: (values) => values.guidance_scale > 1, help: "What the video should not show.",
      },
    );
  }
  if (model.hasUpscaling) {
    fields.push(
      {
        key: "enable_upscaling", group: "Postprocessing", label: "Upscale", kind: "switch", fallback: false,
        help: "A second model enlarges every frame.",
      },
      {
        key: "upscaling_scale", group: "Postprocessing", label: "Upscaling factor", unit: "times", kind: "choice",
        fallback: 4, options: [[2, "2"], [3, "3"], [4, "4"]], when: (values) => values.enable_upscaling,
        help: "Width and height are multiplied by this.",
      },
    );
  }
  if (model.hasInterpolation) {
    fields.push(
      {
        key: "enable_frame_interpolation", group: "Postprocessing", label: "Interpolate frames", kind: "switch",
        fallback: false, help: "Adds frames in between for smoother motion.",
      },
      {
        key: "frame_interpolation_exp", group: "Postprocessing", label: "Interpolation factor", unit: "times",
        kind: "choice", fallback: 1, options: [[1, "2"], [2, "4"], [3, "8"]],
        when: (values) => values.enable_frame_interpolation, help: "Multiplies the number of frames.",
      },
    );
  }
  return fields;
}

/** Why the field refuses what was typed into it; "" if it does not. */
export function problemWith(field, typed) {
  const text = typed.trim();
  if (field.kind === "number") {
    const range = `${field.min} to ${field.max}`;
    if (!text) return field.optional ? "" : `Expected a number, ${range}.`;
    const number = Number(text);
    if (!Number.isFinite(number) || number < field.min || number > field.max) return `Expected ${range}.`;
    if (Number.isInteger(field.step) && !Number.isInteger(number)) return `Expected a whole number, ${range}.`;
  }
  if (field.kind === "text" && [...text].length > field.maxLength)
    return `It has ${[...text].length} characters. Expected at most ${field.maxLength}.`;
  return "";
}

/** `value` as the field allows it: clamped to its range or one of its choices, else the default. */
export function validValue(field, value) {
  const fallback = field.fallback ?? null;
  switch (field.kind) {
    case "number": {
      if (value === null || value === "" || value === undefined) return field.optional ? null : fallback;
      const number = Number(value);
      if (!Number.isFinite(number)) return fallback;
      const clamped = Math.min(Math.max(number, field.min), field.max);
      return Number.isInteger(field.step) ? Math.round(clamped) : clamped;
    }
    case "choice":
      return field.options.find(([option]) => String(option) === String(value))?.[0] ?? fallback;
    case "switch":
      return typeof value === "boolean" ? value : fallback;
    default:
      return typeof value === "string" && !problemWith(field, value) ? value : fallback;
  }
}

export const allValid = (fields, values) =>
  Object.fromEntries(fields.map((field) => [field.key, validValue(field, values[field.key])]));

/** The values that go into the init message. */
export function wireValues(fields, values) {
  const sent = fields.filter((field) => !field.isLocal && values[field.key] !== null && (field.when?.(values) ?? true));
  return Object.fromEntries(sent.map((field) => [field.key, values[field.key]]));
}

/** Values kept in localStorage. Without storage, or when it is full, they last until the page is closed. */
export class SettingsStore {
  #storage;
  #values = {};

  constructor(storage) {
    this.#storage = storage;
    try {
      this.#values = JSON.parse(storage?.getItem(KEY)) ?? {};
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
    }
  }

  get(name, fallback) {
    return this.#values[name] ?? fallback;
  }

  set(name, value) {
    this.#values[name] = value;
    try {
      this.#storage?.setItem(KEY, JSON.stringify(this.#values));
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }
}

/** localStorage, or null if the browser forbids it. */
export function browserStorage() {
  try {
    return globalThis.localStorage;
  } catch {
    return null;
  }
}
