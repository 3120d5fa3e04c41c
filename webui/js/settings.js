// What a player may set: one table with label, unit, range and help; the values are kept in the browser.

const KEY = "lingbot-rt.settings";

const FORMAT_NAMES = {
  webp: "WebP: sharp and small",
  jpeg: "JPEG: light work for both sides",
  raw: "Uncompressed: exact, very large",
  "delta-gzip": "Lossless: exact, large",
};

/**
 * The fields for a model, grouped, each {key, group, label, unit, help, kind, ...}. `kind` is number (min, max, step),
 * choice (options [[value, label]]), text or switch; `fallback` is the default; `optional` numbers may stay empty.
 * A field without `wire` is the page's own and is never sent.
 */
export function fieldsFor(model) {
  const latentWindow = (help) => ({ group: "Memory", unit: "moments", kind: "number", min: 0, max: 64, step: 1, wire: true, help });
  const fields = [
    {
      key: "size", group: "Picture", label: "Size", unit: "pixels", kind: "choice", fallback: model.defaultSize, wire: true,
      options: model.sizes.map((size) => [size, size.replace("x", " × ")]),
      help: "Width and height of the picture. Larger takes longer.",
    },
    {
      key: "fps", group: "Picture", label: "Speed", unit: "frames/s", kind: "number", step: 1, wire: true,
      min: model.fps.min, max: model.fps.max, fallback: model.fps.default,
      help: "How many pictures make up one second of the world.",
    },
    {
      key: "num_frames", group: "Picture", label: "Step length", unit: "frames", kind: "choice", wire: true,
      fallback: model.frames.default, options: model.frames.choices.map((count) => [count, String(count)]),
      help: `Pictures made in one go. The model was taught ${model.frames.default}; shorter answers sooner.`,
    },
    {
      key: "num_inference_steps", group: "Picture", label: "Refinement", unit: "passes", kind: "number", step: 1, wire: true,
      min: 1, max: Math.min(model.steps.max, model.steps.default), fallback: model.steps.default,
      help: "How often each picture is refined. Fewer is faster and rougher.",
    },
    {
      key: "realtime_output_format", group: "Transport", label: "Format", kind: "choice", wire: true,
      fallback: model.formats.includes("webp") ? "webp" : model.formats[0],
      options: model.formats.map((format) => [format, FORMAT_NAMES[format] ?? format]),
      help: "How pictures travel from the server to this page.",
    },
    {
      key: "output_compression", group: "Transport", label: "Quality", unit: "1 to 100", kind: "number", step: 1, wire: true,
      min: 1, max: 100, fallback: 92, when: (values) => ["webp", "jpeg"].includes(values.realtime_output_format),
      help: "Quality of WebP and JPEG. Lower is smaller.",
    },
    {
      key: "realtime_preview_max_width", group: "Transport", label: "Widest picture", unit: "pixels", kind: "number", step: 16,
      min: 16, max: 4096, optional: true, wire: true, when: (values) => ["webp", "jpeg"].includes(values.realtime_output_format),
      help: "Shrinks larger pictures before they travel. Empty: full size.",
    },
    {
      key: "playback", group: "Transport", label: "Playback", kind: "choice", fallback: "low-latency",
      options: [["low-latency", "Quick: answers at once"], ["smooth", "Smooth: evens out a shaky network"]],
      help: "How long pictures wait before they are shown.",
    },
    {
      key: "realtime_output_pacing", group: "Transport", label: "Keep the world's own pace", kind: "switch", fallback: true, wire: true,
      help: "The server waits rather than run ahead of you. Keys answer sooner.",
    },
    {
      key: "realtime_causal_sink_size", label: "Never forgets the first", optional: true, placeholder: model.sink,
      ...latentWindow("The beginning of the world that always stays in mind. Empty: the model's own."),
    },
    {
      key: "realtime_causal_kv_cache_num_frames", label: "Remembers in all", optional: true, placeholder: model.window,
      ...latentWindow("How far back the world remembers, the beginning included. Empty: the model's own."),
    },
    {
      key: "max_chunks", group: "Session", label: "Ends after", unit: "steps", kind: "number", min: 1, max: 100000, step: 1,
      optional: true, wire: true, help: "The world ends by itself after so many steps. Empty: never.",
    },
  ];
  if (model.hasGuidance) {
    fields.push(
      {
        key: "guidance_scale", group: "Words", label: "Follow the words", unit: "strength", kind: "number", min: 1, max: 15, step: 0.5,
        fallback: 1, wire: true, help: "1 is the model's own. Above 1 takes twice as long.",
      },
      {
        key: "negative_prompt", group: "Words", label: "Avoid", kind: "text", fallback: "", wire: true, maxLength: 8192,
        when: (values) => values.guidance_scale > 1, help: "What should not be in the picture.",
      },
    );
  }
  if (model.hasUpscaling) {
    fields.push(
      {
        key: "enable_upscaling", group: "Finish", label: "Sharpen and enlarge", kind: "switch", fallback: false, wire: true,
        help: "A second model enlarges every picture.",
      },
      {
        key: "upscaling_scale", group: "Finish", label: "Enlarge by", unit: "times", kind: "choice", fallback: 4, wire: true,
        options: [[2, "2"], [3, "3"], [4, "4"]], when: (values) => values.enable_upscaling, help: "Width and height grow by this.",
      },
    );
  }
  if (model.hasInterpolation) {
    fields.push(
      {
        key: "enable_frame_interpolation", group: "Finish", label: "Fill in motion", kind: "switch", fallback: false, wire: true,
        help: "Pictures are added in between for smoother motion.",
      },
      {
        key: "frame_interpolation_exp", group: "Finish", label: "Pictures per picture", unit: "times", kind: "choice", fallback: 1, wire: true,
        options: [[1, "2"], [2, "4"], [3, "8"]], when: (values) => values.enable_frame_interpolation, help: "How many pictures one becomes.",
      },
    );
  }
  return fields;
}

/** `value` as the field allows it: a number in range, one of the choices; anything else becomes the default. */
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
      return typeof value === "string" ? value.slice(0, field.maxLength) : fallback;
  }
}

export const allValid = (fields, values) => Object.fromEntries(fields.map((field) => [field.key, validValue(field, values[field.key])]));

/** The part of the values that goes into an init. */
export function wireValues(fields, values) {
  const sent = fields.filter((field) => field.wire && values[field.key] !== null && (field.when?.(values) ?? true));
  return Object.fromEntries(sent.map((field) => [field.key, values[field.key]]));
}

/** A small part of localStorage that never throws: a page without storage forgets, and works. */
export class Remembered {
  #storage;
  #values = {};

  constructor(storage, key = KEY) {
    this.#storage = storage;
    this.key = key;
    try {
      this.#values = JSON.parse(storage?.getItem(key)) ?? {};
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
      this.#storage?.setItem(this.key, JSON.stringify(this.#values));
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }
}

/** localStorage, or null where the browser forbids it. */
export function pageStorage() {
  try {
    return globalThis.localStorage;
  } catch {
    return null;
  }
}
