// Set the chosen colours before the first paint.
try {
  const chosen = localStorage.getItem("inlaid.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be forbidden: the system's colours are used.
}
