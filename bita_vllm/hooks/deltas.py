"""Spots of vLLM that low-rank deltas build on, on both runners."""

from bita_vllm.hooks.hook import Hook

_LINEAR = "vllm.model_executor.layers.linear"
_MODEL_UTILS = "vllm.model_executor.models.utils"

DELTA_HOOKS = (
    Hook(
        f"{_LINEAR}:LinearMethodBase.apply",
        "adds the delta to what a linear layer computes",
        "(self, layer, x, bias=)",
    ),
    Hook(f"{_LINEAR}:ReplicatedLinear.forward", "computes with its linear method", "(self, x)"),
    Hook(
        f"{_LINEAR}:ColumnParallelLinear.forward",
        "computes with its linear method",
        "(self, input_)",
    ),
    Hook(
        f"{_LINEAR}:RowParallelLinear.forward", "computes with its linear method", "(self, input_)"
    ),
    Hook(
        "vllm.model_executor.utils:get_packed_modules_mapping",
        "which projections a model fuses",
        "(model)",
    ),
    Hook(f"{_MODEL_UTILS}:WeightsMapper.get_rename_mapper", "names of modules", "(self)"),
    Hook(f"{_MODEL_UTILS}:WeightsMapper.map_name", "names of modules", "(self, key)"),
    Hook(
        "vllm.utils.torch_utils:direct_register_custom_op",
        "an operation that is not compiled",
        "(op_name, op_func, mutates_args=, fake_impl=, target_lib=, dispatch_key=, tags=)",
    ),
)
