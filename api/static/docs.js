"use strict";

// Descriptions are shown as they are written: Swagger UI would make HTML of them as a string, which the
// Content-Security-Policy of this page does not take.
const plainText = (system) => ({
  wrapComponents: {
    Markdown: () => ({ source }) => (source ? system.React.createElement("p", {}, source) : null),
  },
});

window.ui = SwaggerUIBundle({
  url: "../openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  plugins: [plainText],
});
