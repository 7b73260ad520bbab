// Conversations in the browser's storage. Each has its own key, so that tabs do not overwrite each other's conversations.

const PREFIX = "linalign.conversation.";

export class Conversations {
  all = load(); // newest first
  current = empty();

  /** changed(): called when another tab has changed conversations. */
  constructor(changed) {
    if (this.all.length) this.current = this.all[0];
    else this.all.push(this.current);
    addEventListener("storage", () => {
      const found = load().filter(({ id }) => id !== this.current.id);
      this.all = [...found, this.current].sort(newestFirst);
      changed();
    });
  }

  open(index) {
    this.current = this.all[index];
  }

  create() {
    this.current = empty();
    this.all.unshift(this.current);
  }

  delete() {
    storage()?.removeItem(PREFIX + this.current.id);
    this.all = this.all.filter((one) => one !== this.current);
    if (!this.all.length) this.all.push(empty());
    this.current = this.all[0];
  }

  /** Stores the current conversation; returns false if the browser refuses. */
  save() {
    try {
      storage().setItem(PREFIX + this.current.id, JSON.stringify(this.current));
      return true;
    } catch {
      return false;
    }
  }
}

function empty() {
  const id = `${Date.now()}.${Math.random().toString(36).slice(2)}`;
  return { id, principles: [{ text: "", weight: 1 }], ratio: 2, messages: [] };
}

function load() {
  const found = [];
  for (const [key, text] of Object.entries({ ...storage() })) {
    if (!key.startsWith(PREFIX)) continue;
    try {
      const one = JSON.parse(text);
      if (isConversation(one)) found.push(one);
    } catch {
      // not a conversation of this page
    }
  }
  return found.sort(newestFirst);
}

function isConversation(one) {
  const isText = (value) => typeof value === "string";
  return (
    isText(one?.id) &&
    Number.isFinite(one.ratio) &&
    Array.isArray(one.principles) &&
    one.principles.every((principle) => isText(principle?.text)) &&
    Array.isArray(one.messages) &&
    one.messages.every((message) => ["user", "assistant"].includes(message?.role) && isText(message.content))
  );
}

function newestFirst(one, other) {
  return Number.parseInt(other.id) - Number.parseInt(one.id);
}

function storage() {
  try {
    return localStorage;
  } catch {
    return null; // storage is not allowed
  }
}
