// The wire without a socket: addresses, what the page sends, and what arrives put together into whole messages.

import { decode, encode } from "./msgpack.js";

export const ENDPOINT = "/v1/realtime_video/generate";
export const EXTENSIONS = ["session", "queue", "control_ack", "heartbeat", "pause", "pinned_events"];
const STATIC_PAGE_PORT = "18080";
const SERVER_PORT = "30000";

/**
 * Where the server is, as "http://host:port" without a slash at the end. `typed` may be a host, a host and port, an
 * http(s) or ws(s) address, or the endpoint itself; empty means the page's own host. Throws TypeError.
 */
export function serverBase(typed, page) {
  const text = typed.trim();
  if (!text) {
    if (!page.protocol.startsWith("http")) return `http://127.0.0.1:${SERVER_PORT}`;
    // The documented static server stands beside the real one, on the same host.
    return page.port === STATIC_PAGE_PORT ? `${page.protocol}//${page.hostname}:${SERVER_PORT}` : page.origin;
  }
  const secure = page.protocol === "https:" ? "https" : "http";
  const url = new URL(/^[a-z]+:\/\//i.test(text) ? text : `${secure}://${text}`);
  const protocol = { "http:": "http", "https:": "https", "ws:": "http", "wss:": "https" }[url.protocol];
  if (!protocol) throw new TypeError(`${url.protocol} is not an address a world can come from`);
  return `${protocol}://${url.host}${url.pathname.replace(ENDPOINT, "").replace(/\/+$/, "")}`;
}

/** The WebSocket's address. A browser cannot set headers there, so the key travels in the query. */
export function socketUrl(base, apiKey) {
  const url = base.replace(/^http/, "ws") + ENDPOINT;
  return apiKey ? `${url}?api_key=${encodeURIComponent(apiKey)}` : url;
}

export const initMessage = (fields) => encode({ type: "init", ...fields });

export const eventMessage = (kind, payload, eventId) => encode({ type: "event", kind, payload, event_id: eventId });

export const statePayload = (transitions) => ({
  mode: "state",
  transitions: transitions.map(({ actions, at }) => ({ actions, client_ts_ms: at })),
});

/**
 * A new prompt together with the keys held now. As one composite both take effect in the same chunk and share their
 * event id, so the first frame that shows the prompt is known even while a key is held.
 */
export const promptPayload = (prompt, actions, at) => ({
  input_types: ["camera_actions", "prompt"],
  camera_actions: statePayload([{ actions, at }]),
  prompt,
});

/** Puts messages together. A batch's header and its payload are two messages that belong to each other. */
export class MessageReader {
  #header = null;

  /** ArrayBuffer -> {header, payload} for frames, {message} for the rest, null while half of a batch is missing. */
  read(data) {
    if (this.#header) {
      const header = this.#header;
      this.#header = null;
      return { header, payload: new Uint8Array(data) };
    }
    const message = decode(data);
    if (message.type === "frame_batch_header") {
      this.#header = message;
      return null;
    }
    if (message.type === "frame_batch") {
      const { payload, ...header } = message;
      return { header, payload: payload ?? new Uint8Array(0) };
    }
    return { message };
  }
}
