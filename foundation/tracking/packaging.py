"""A registered version on disk: an MLflow model from code, with backbone, adapter and card as its artifacts.

``artifacts/backbone`` is a whole model (`foundation.checkpoint`), ``artifacts/adapter`` one subject's adapter of it, if
the version is an adapter's, and ``artifacts/card`` what is told of it. An adapter's version has the backbone that it
was fitted on, so either predicts by itself. Nothing in it is pickled: the code is `foundation.tracking.served_model`.
"""

import io
import logging
import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image
from safetensors import safe_open

from foundation.checkpoint import load_adapter, load_model, new_directory, read_description
from foundation.model.encoding_model import EncodingModel, adapter_key

IMAGE = "image"
"""The column of a request that holds picture files' bytes."""
ENCODER = "encoder"
"""The entry of MLflow's `model_config` that names a directory or hub name, in place of the lineage's encoder."""
_ARTIFACTS = "artifacts"
_CODE = Path(__file__).with_name("served_model.py")
_NEEDED = (
    *("h5py", "jaxtyping", "mlflow", "nibabel", "numpy", "pandas", "pillow", "platformdirs", "rich", "safetensors"),
    *("scipy", "torch", "transformers", "tyro", "zarr"),
)
"""What a prediction imports beside manybrains itself, which no package index has."""


def package(directory: Path, *, backbone: Path, card: Path, adapter: Path | None = None) -> None:
    """Write the MLflow model of a backbone, or of an adapter with its backbone, into `directory`, which is new.

    Parameters
    ----------
    backbone, adapter : model directories (`foundation.checkpoint.save_model`; `adapter` that of one subject).
    card : directory of the model card.

    Raises
    ------
    ValueError
        If `directory` is there already, or one of the parts isn't what it should be.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a new directory")
    if not card.is_dir():
        raise ValueError(f"{card} is not a directory; write the card first")
    parts = {"backbone": backbone, "card": card} | ({"adapter": adapter} if adapter is not None else {})
    signature = _signature(backbone, adapter)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with new_directory(directory) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Operation with range is deprecated")  # MLflow's own, in pandas 3
        mlflow.pyfunc.save_model(
            str(draft),
            python_model=str(_CODE),
            signature=signature,
            input_example=pd.DataFrame({IMAGE: [example_picture()]}),
            pip_requirements=[f"{name}=={_release(name)}" for name in _NEEDED],
            model_config={ENCODER: None},
            uv_project_path=draft,  # holds none; by default that of the working directory would be copied
        )
        # Left to MLflow, artifacts are copied three times, with a progress bar each, and this machine's paths are kept.
        described = Model.load(str(draft))
        artifacts = {name: {"path": f"{_ARTIFACTS}/{name}", "uri": f"{_ARTIFACTS}/{name}"} for name in parts}
        described.flavors["python_function"] |= {"artifacts": artifacts, "model_code_path": _CODE.name}
        described.save(str(draft / "MLmodel"))
        for name, source in parts.items():
            shutil.copytree(source, draft / _ARTIFACTS / name)


def _release(name: str) -> str:
    """Return a package's version as an index has it: torch's own wheels add ``+cpu``."""
    return re.sub(r"\+.*", "", version(name))


def example_picture() -> bytes:
    """Return a small picture as the bytes of a PNG: a colour gradient."""
    side = np.linspace(0, 255, 32).astype(np.uint8)
    red, green = np.meshgrid(side, side)
    file = io.BytesIO()
    Image.fromarray(np.stack([red, green, 255 - red], axis=-1)).save(file, "png")
    return file.getvalue()


def _signature(backbone: Path, adapter: Path | None) -> ModelSignature:
    """Return what a version takes and gives: pictures, options, and a response per image and voxel.

    The output is (image, voxel), or (image, sample, voxel) where samples are asked for; a signature has room for one.
    """
    subjects = _n_voxels(backbone, "model")
    params = [ParamSpec("n_samples", "long", 0), ParamSpec("seed", "long", 0)]
    if adapter is not None:
        subjects = _n_voxels(adapter, "adapter")
    elif subjects:
        params.append(ParamSpec("subject", "string", next(iter(subjects))))
    else:
        raise ValueError(f"{backbone} has no subject, so it predicts nothing; give an adapter with it")
    sizes = set(subjects.values())
    n_voxel = sizes.pop() if len(sizes) == 1 else -1
    return ModelSignature(
        inputs=Schema([ColSpec("binary", IMAGE)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, n_voxel))]),
        params=ParamSchema(params),
    )


def _n_voxels(directory: Path, kind: str) -> dict[str, int]:
    """Return each subject's number of voxels, from the header of a model's weights; `kind` is what it must be."""
    description = read_description(directory)
    if description["kind"] != kind:
        raise ValueError(
            f"{directory} holds one {description['kind']}, where a whole {kind} is needed; name another directory"
        )
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {
            name: file.get_slice(f"adapters.{adapter_key(name)}.parcel").get_shape()[0]
            for name in description["subjects"]
        }


def backbone_in(directory: Path) -> Path:
    """Return the backbone's model directory in a version's `directory`.

    Raises
    ------
    ValueError
        If there is none: a version of before versions were MLflow models.
    """
    path = directory / _ARTIFACTS / "backbone"
    if not path.is_dir():
        raise ValueError(f"{directory} holds no backbone: an older manybrains registered it; pretrain or adapt again")
    return path


def adapter_in(directory: Path) -> Path | None:
    """Return the adapter's directory in a version's `directory`; None in a backbone's."""
    path = directory / _ARTIFACTS / "adapter"
    return path if path.exists() else None


def card_in(directory: Path) -> Path:
    """Return the directory of the model card in a version's `directory`."""
    return directory / _ARTIFACTS / "card"


def load_packaged(directory: Path) -> tuple[EncodingModel, dict[str, Any]]:
    """Return a version's whole model on the CPU, an adapter put into its backbone, and its lineage.

    The lineage is the adapter's, with the backbone's `encoder`; or the backbone's.

    Raises
    ------
    ValueError
        If `directory` holds no such version, or a part of it is damaged.
    """
    return load_parts(backbone_in(directory), adapter_in(directory))


def load_parts(backbone: Path, adapter: Path | None) -> tuple[EncodingModel, dict[str, Any]]:
    """Return the model of a backbone's directory with the adapter of another put into it; as `load_packaged`.

    Raises
    ------
    ValueError
        If one of the two is no model, or damaged.
    """
    model, lineage = load_model(backbone)
    if adapter is None:
        return model, lineage
    _, of_adapter = load_adapter(model, adapter)
    fitted_on = of_adapter.get("backbone_digest")
    if fitted_on is not None and fitted_on != read_description(backbone)["weights"]:
        raise ValueError(f"the adapter in {adapter} was fitted on another backbone than the one in {backbone}")
    encoder = {"encoder": lineage["encoder"]} if "encoder" in lineage else {}
    return model.eval(), encoder | of_adapter
