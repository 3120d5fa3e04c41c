// The wire protocol without a socket: addresses, outgoing messages, and a reader for incoming ones.

import { decode, encode } from "./msgpack.js";

const ENDPOINT = "/v1/realtime_video/generate";
export const EXTENSIONS = [
  "session",
  "queue",
  "warming",
  "control_ack",
  "heartbeat",
  "pause",
  "pinned_events",
  "history",
];
export const STATIC_PAGE_PORT = "18080";
const SERVER_PORT = "30000";

const HOST = /^(\[[\da-f:.]+\]|[a-z\d_]([a-z\d_-]*[a-z\d_])?(\.[a-z\d_]([a-z\d_-]*[a-z\d_])?)*\.?)$/i;

/**
 * The server's base URL, "http://host:port/path" without a trailing slash. `typed` may be a host, a host and port, an
 * http(s) or ws(s) URL, or the endpoint's URL; empty means the folder that the page itself is in. `isStatic` says that
 * the page comes from a server of files; the real server then has its usual port. Throws TypeError.
 */
export function serverBase(typed, page, isStatic = page.port === STATIC_PAGE_PORT) {
  const text = typed.trim();
  if (!text) {
    if (!page.protocol.startsWith("http")) return `http://127.0.0.1:${SERVER_PORT}`;
    if (isStatic) return `${page.protocol}//${page.hostname}:${SERVER_PORT}`;
    return page.origin + withoutEnd(page.pathname.replace(/[^/]*$/, ""));
  }
  const secure = page.protocol === "https:" ? "https" : "http";
  const url = new URL(/^[a-z]+:\/\//i.test(text) ? text : `${secure}://${text}`);
  const protocol = { "http:": "http", "https:": "https", "ws:": "http", "wss:": "https" }[url.protocol];
  if (!protocol) throw new TypeError(`${url.protocol} is not supported: use http, https, ws or wss`);
  // Browsers accept hosts that no name server knows, with spaces for instance.
  if (!HOST.test(url.hostname)) throw new TypeError(`${url.hostname} is not a host name`);
  return `${protocol}://${url.host}${withoutEnd(url.pathname)}`;
}

/** The path without what people copy along: the page's file, the endpoint, /v1/models, /v1, slashes. */
const withoutEnd = (path) =>
  path.replace(/\/+$/, "").replace(/\/(index\.html|v1(\/models|\/realtime_video\/generate)?)$/, "").replace(/\/+$/, "");

/** The WebSocket URL. Browsers cannot set headers on a WebSocket, so the key is in the query. */
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
 * A new prompt together with the keys held now, as one composite event. Both take effect in the same chunk and share
 * one event id. The first frame with this id shows the prompt, also on servers that echo the id of held keys instead of
 * a newer prompt's id.
 */
export const promptPayload = (prompt, actions, at) => ({
  input_types: ["camera_actions", "prompt"],
  camera_actions: statePayload([{ actions, at }]),
  prompt,
});

/** Reads messages. Large frame batches arrive as two: a header, then its payload. */
export class MessageReader {
  #header = null;

  /** ArrayBuffer -> {header, payload} for frames, {message} for the rest, null after a header whose payload follows. */
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
