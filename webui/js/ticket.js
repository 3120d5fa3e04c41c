// What a reloaded page needs to go on with its session, in this tab's own storage.

const KEY = "lingbot-rt.world";
const LEFT_OUT = ["first_frame", "pinned_events"]; // too large, and the server has them

/** `ticket` is {base, token, resumeMs, init}, and at the end {leftAt, picture} as well. */
export function keepTicket({ init, ...ticket }, storage = sessionStorageOf(globalThis)) {
  const kept = Object.fromEntries(Object.entries(init).filter(([name]) => !LEFT_OUT.includes(name)));
  try {
    storage?.setItem(KEY, JSON.stringify({ ...ticket, init: kept }));
  } catch {
    // The storage is full: a reload starts anew.
  }
}

export function forgetTicket(storage = sessionStorageOf(globalThis)) {
  storage?.removeItem(KEY);
}

/**
 * The ticket for the server at `base`, or null. It is taken out of the storage. One that was left for longer than the
 * server keeps sessions counts as none, also if that was while the server was away.
 */
export function takeTicket(base, now, storage = sessionStorageOf(globalThis)) {
  let ticket;
  try {
    ticket = JSON.parse(storage?.getItem(KEY) ?? "null");
  } catch {
    ticket = null;
  }
  forgetTicket(storage);
  if (!ticket || ticket.base !== base || typeof ticket.token !== "string" || !ticket.init) return null;
  return now - (ticket.leftAt ?? now) > ticket.resumeMs ? null : ticket;
}

function sessionStorageOf(window) {
  try {
    return window.sessionStorage ?? null;
  } catch {
    return null; // forbidden by the browser
  }
}
