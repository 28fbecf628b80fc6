"""An engine that only keeps a list of what it was asked to load."""

from __future__ import annotations

from pathlib import Path

from inlaid.worker.messages import AdapterInfo


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

    async def describe_adapter(self, name: str) -> AdapterInfo:
        busy = self.adapters[name] == "busy"
        return AdapterInfo(name=name, identity=name, path=name, rank=1, bytes=1, tier="host", requests=int(busy))

    async def unload_adapter(self, name: str) -> int:
        self.calls.append(f"unload {name}")
        del self.adapters[name]
        return 0


def write(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(content)
    return folder
