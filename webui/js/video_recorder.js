// Records the canvas: MP4 through WebCodecs if the browser can encode H.264, else WebM through MediaRecorder.

import { mp4File } from "./mp4.js";

const KEY_FRAME_EVERY_MS = 2000;
const CODECS = ["avc1.640034", "avc1.4d0034", "avc1.42003e"];
const WEBM_TYPES = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"];

export const MAX_RECORDING_MS = 600_000;

/** Starts a recorder with frame(now), stop(now) -> Promise<Blob> and `extension`. Null without an encoder. */
export async function startRecording(canvas, now) {
  const config = await h264Config(canvas.width, canvas.height);
  if (config) return new Mp4Recorder(canvas, config, now);
  const mimeType = globalThis.MediaRecorder && WEBM_TYPES.find((type) => MediaRecorder.isTypeSupported(type));
  return mimeType ? new WebmRecorder(canvas, mimeType) : null;
}

export const canRecord = () =>
  Boolean(globalThis.VideoEncoder || (globalThis.MediaRecorder && HTMLCanvasElement.prototype.captureStream));

async function h264Config(width, height) {
  if (!globalThis.VideoEncoder || width % 2 || height % 2) return null;
  for (const codec of CODECS) {
    const bitrate = Math.max(1_500_000, Math.round(width * height * 8));
    const config = { codec, width, height, bitrate, latencyMode: "quality", avc: { format: "avc" } };
    if ((await VideoEncoder.isConfigSupported(config)).supported) return config;
  }
  return null;
}

class Mp4Recorder {
  extension = "mp4";
  #canvas;
  #size;
  #encoder;
  #samples = [];
  #description = null;
  #startedAt;
  #lastKey = -Infinity;
  #failure = null;

  constructor(canvas, config, now) {
    this.#canvas = canvas;
    this.#size = { width: config.width, height: config.height };
    this.#startedAt = now;
    this.#encoder = new VideoEncoder({
      output: (chunk, { decoderConfig }) => {
        if (decoderConfig?.description) this.#description = new Uint8Array(decoderConfig.description);
        const data = new Uint8Array(chunk.byteLength);
        chunk.copyTo(data);
        this.#samples.push({ data, isKey: chunk.type === "key", at: chunk.timestamp / 1000 });
      },
      error: (error) => (this.#failure = error),
    });
    this.#encoder.configure(config);
    this.frame(now);
  }

  /** A new frame is on the canvas. */
  frame(now) {
    const isSameSize = this.#canvas.width === this.#size.width && this.#canvas.height === this.#size.height;
    if (this.#encoder.state !== "configured" || !isSameSize) return;
    const at = now - this.#startedAt;
    const frame = new VideoFrame(this.#canvas, { timestamp: Math.round(at * 1000) });
    const keyFrame = at - this.#lastKey >= KEY_FRAME_EVERY_MS;
    if (keyFrame) this.#lastKey = at;
    this.#encoder.encode(frame, { keyFrame });
    frame.close();
  }

  async stop(now) {
    if (this.#encoder.state === "configured") {
      await this.#encoder.flush();
      this.#encoder.close();
    }
    if (this.#failure || !this.#samples.length) throw new Error(this.#failure?.message ?? "no frame was drawn");
    const end = now - this.#startedAt;
    const parts = mp4File({ ...this.#size, description: this.#description, samples: this.#samples, end });
    return new Blob(parts, { type: "video/mp4" });
  }
}

class WebmRecorder {
  extension = "webm";
  #recorder;
  #parts = [];

  constructor(canvas, mimeType) {
    this.#recorder = new MediaRecorder(canvas.captureStream(), { mimeType, videoBitsPerSecond: 6_000_000 });
    this.#recorder.ondataavailable = ({ data }) => this.#parts.push(data);
    this.#recorder.start(1000);
  }

  frame() {} // captureStream() follows the canvas

  async stop() {
    await new Promise((resolve) => {
      this.#recorder.onstop = resolve;
      this.#recorder.stop();
    });
    return new Blob(this.#parts, { type: "video/webm" });
  }
}
