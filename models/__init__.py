"""The bundled demo, the script that rebuilds it, and fetchers of real models and adapters."""
