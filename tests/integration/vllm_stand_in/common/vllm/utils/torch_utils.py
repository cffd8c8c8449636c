import torch
from torch.library import Library

vllm_lib = Library("vllm", "FRAGMENT")


def direct_register_custom_op(op_name, op_func, mutates_args=None, fake_impl=None):
    schema = torch.library.infer_schema(op_func, mutates_args=mutates_args or [])
    vllm_lib.define(op_name + schema)
    vllm_lib.impl(op_name, op_func, dispatch_key="CPU")
    if fake_impl is not None:
        vllm_lib._register_fake(op_name, fake_impl)
