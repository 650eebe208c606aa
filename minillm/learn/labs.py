"""Execute lab notebooks in place, top to bottom, and keep their outputs: `python -m minillm.learn.labs 02`."""

import sys
import time

from .paths import root

__all__ = ["execute"]


def execute(stem: str) -> float:
    """Run notebooks/<stem>.ipynb with its folder as the current one, store the outputs, and return the seconds it took.

    The file is replaced only when every cell ran. Raises nbclient's CellExecutionError otherwise.
    """
    import nbformat
    from nbclient import NotebookClient

    path = root() / "notebooks" / f"{stem}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    seconds = time.perf_counter() - start
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{stem}-{i:02d}"
        cell.metadata.pop("execution", None)  # wall-clock times: noise in every diff
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return seconds


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for notebook_path in sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if not wanted or notebook_path.stem[:2] in wanted or notebook_path.stem in wanted:
            print(f"{notebook_path.name}: {execute(notebook_path.stem):.0f} s", flush=True)
