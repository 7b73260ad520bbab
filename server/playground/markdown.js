// Text of a model as a document fragment: nothing in it can run, load or style anything.

import DOMPurify from "./vendor/dompurify/dist/purify.es.mjs";
import { marked } from "./vendor/marked/lib/marked.esm.js";

const TAGS =
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s strong sub sup table tbody td th thead tr ul";
const RULES = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const ESCAPED = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
marked.use({ renderer: { html: ({ text }) => text.replace(/[&<>]/g, (mark) => ESCAPED[mark]) } }); // shown as it is

export function markdown(text) {
  return DOMPurify.sanitize(marked.parse(text, { breaks: true }), RULES);
}
