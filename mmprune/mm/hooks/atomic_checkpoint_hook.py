"""The mmengine hook that has checkpoint files written whole or not at all."""

from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.mm.atomic_files import ATOMIC


@HOOKS.register_module()
class AtomicCheckpointHook(Hook):
    """Has every ``CheckpointHook`` that writes to a local disk write beside the file's name and rename,
    and remove old files only after that. One with ``backend_args`` of its own is left as it is."""

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            own = isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args)
            if own and '://' not in str(hook.out_dir):
                hook.backend_args = dict(ATOMIC)
