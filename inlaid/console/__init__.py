"""The console: what the server tells its web page, and the page itself. Host only; `inlaid.server` calls it."""
