"""An engine that only keeps a list of what it was asked to load."""

from __future__ import annotations

from pathlib import Path


class FakeLoads:
    """Refuses folders whose weights file says so."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self.calls: list[str] = []

    async def load_adapter(self, name: str, path: str, in_place: bool = False) -> None:
        self.calls.append(f"{'swap' if in_place else 'load'} {name}")
        content = (Path(path) / "adapter_model.safetensors").read_text()
        if content == "bad":
            raise ValueError("damaged or cut short")
        self.adapters[name] = content

    async def unload_adapter(self, name: str) -> int:
        self.calls.append(f"unload {name}")
        del self.adapters[name]
        return 0


def write(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(content)
    return folder
