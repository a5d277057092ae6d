"""Uploading a trained model with its card, after it is safely on disk.

The login is huggingface_hub's own (`hf auth login`, or HF_TOKEN): no token passes through a field, a file or a message.
"""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from trainer.base.environment import offline
from trainer.base.errors import TrainingFailed, UserError, first_line
from trainer.base.log import log
from trainer.config import HubConfig


def repository(config: HubConfig, folder: Path) -> str:
    """hub_model_id, or the run folder's name. Raises UserError where the hub does not allow it."""
    name = config.hub_model_id or folder.absolute().name
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"hub_model_id {name!r}: {first_line(error)}") from None
    return name


def push(config: HubConfig, folder: Path) -> str:
    """Uploads `folder`/model, and returns its address. Raises TrainingFailed with how to upload it later."""
    name, model = repository(config, folder), folder / "model"
    try:
        if offline():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        api = HfApi()
        made = api.create_repo(name, private=config.hub_private_repo or None, exist_ok=True)
        if config.hub_private_repo and not api.repo_info(made.repo_id).private:
            raise PermissionError("it exists and is public; take another --hub_model_id")
        api.upload_folder(repo_id=made.repo_id, folder_path=model, commit_message="crossrank: model and card")
    except Exception as error:  # of the hub's client, the network, or the login
        reason = first_line(error)
        if token := get_token():
            reason = reason.replace(token, "***")
        raise TrainingFailed(
            f"the model is complete in {model}, but could not be uploaded to {name} ({reason}); with a login and "
            f"network: hf upload {name} {model}"
        ) from None
    log.info(f"uploaded: {made}")
    return str(made)
