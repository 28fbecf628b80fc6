"""The step loop: requests in, tokens out. Host code above (scheduler, ledger, cache), device code below (runner)."""
