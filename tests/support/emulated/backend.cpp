// A device for PyTorch that computes on the CPU but is another device: its tensors do not mix with the CPU's.
//
// Memory is the CPU's, so every operator runs as the CPU's kernel on aliases of its arguments, after a check that they
// lie on one device, as CUDA's operators check it. Everything above the kernels (autograd, autocast, views, fake
// tensors, deepcopy, checkpoints) is PyTorch's own code for a device that is not the CPU.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
const c10::Device kFirst(kDevice, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kFirst; }
  c10::Device getDevice() const override { return kFirst; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kFirst); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kFirst); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kFirst); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto allocated = storage.allocator()->allocate(size);
    std::memcpy(allocated.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(allocated));
    storage.set_nbytes(size);
  }
};

void forget(void* data) { c10::GetCPUAllocator()->raw_deallocate(data); }

int64_t allocated_bytes = 0;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    allocated_bytes += static_cast<int64_t>(size);
    void* data = size ? c10::GetCPUAllocator()->raw_allocate(size) : nullptr;
    return {data, data, &forget, kFirst};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

// The same memory as a tensor of the CPU, which keeps the storage alive.
at::Tensor as_cpu(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  auto made = c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.mutable_data(), new c10::Storage(storage),
                   [](void* held) { delete static_cast<c10::Storage*>(held); }, c10::Device(c10::kCPU)),
      c10::GetCPUAllocator(), true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(made), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  impl->_set_conj(tensor.is_conj());
  impl->_set_neg(tensor.is_neg());
  return result;
}

// The same memory as a tensor of the device.
at::Tensor as_device(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  auto made = c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.mutable_data(), new c10::Storage(storage),
                   [](void* held) { delete static_cast<c10::Storage*>(held); }, kFirst),
      &allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(made), kKeys, tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

// CUDA takes indices from the CPU; and lengths of packed sequences must lie there.
const std::set<std::string> kTakesTensorsOfCpu = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward", "aten::_pad_packed_sequence"};
// CUDA's kernels take a scalar of the CPU where TensorIterator does, but for these.
const std::set<std::string> kRefusesScalarsOfCpu = {
    "aten::fake_quantize_per_tensor_affine", "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten::fake_quantize_per_channel_affine", "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::cat", "aten::stack", "aten::mm", "aten::addmm", "aten::bmm", "aten::convolution",
    "aten::convolution_overrideable", "aten::linear"};

void check_one_device(const c10::OperatorHandle& op, const std::vector<at::Tensor>& tensors) {
  const auto& name = op.schema().name();
  if (kTakesTensorsOfCpu.count(name)) return;
  bool refuses_scalars = kRefusesScalarsOfCpu.count(name) > 0;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(
        on_device(tensor) || (tensor.dim() == 0 && !refuses_scalars),
        "Expected all tensors to be on the same device, but found at least two devices, emulated:0 and ",
        tensor.device(), "! (when checking arguments in method ", name, ")");
  }
}

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  if (value.isTensorList()) return value.toTensorVector();
  std::vector<at::Tensor> found;
  if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& item : value.toOptionalTensorList()) found.push_back(item.value_or(at::Tensor()));
  }
  return found;
}

// Aliases of the CPU by their impl to the tensor that they stand for.
struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
  std::vector<at::Tensor> seen;

  at::Tensor enter(const at::Tensor& tensor) {
    if (tensor.defined()) seen.push_back(tensor);
    if (!on_device(tensor)) return tensor;
    for (auto& pair : pairs)
      if (pair.second.is_same(tensor)) return pair.first;
    pairs.emplace_back(as_cpu(tensor), tensor);
    return pairs.back().first;
  }

  at::Tensor leave(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& pair : pairs)
      if (pair.first.is_same(tensor)) return pair.second;
    return as_device(tensor);
  }

  // An `out` that the kernel has resized has other memory.
  void settle() {
    for (auto& [alias, tensor] : pairs) {
      if (alias.sizes() == tensor.sizes() && alias.storage().data() == tensor.storage().data()) continue;
      auto moved = as_device(alias);
      auto* impl = tensor.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(moved.storage());
      impl->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
    }
  }
};

c10::IValue entered(const c10::IValue& value, Aliases& aliases) {
  if (value.isTensor()) return aliases.enter(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(aliases.enter(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : tensors_of(value))
      list.push_back(tensor.defined() ? std::optional<at::Tensor>(aliases.enter(tensor)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kDevice) return c10::Device(c10::kCPU);
  return value;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto number = op.schema().arguments().size();
  Aliases aliases;
  auto arguments = torch::jit::last(stack, number).vec();
  torch::jit::drop(stack, number);
  for (auto& argument : arguments) torch::jit::push(*stack, entered(argument, aliases));
  check_one_device(op, aliases.seen);
  {
    at::AutoDispatchBelowAutograd below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  aliases.settle();
  const auto results = op.schema().returns().size();
  auto answers = torch::jit::last(stack, results).vec();
  torch::jit::drop(stack, results);
  for (auto& answer : answers) {
    if (answer.isTensor()) {
      torch::jit::push(*stack, aliases.leave(answer.toTensor()));
    } else if (answer.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& tensor : answer.toTensorVector()) list.push_back(aliases.leave(tensor));
      torch::jit::push(*stack, std::move(list));
    } else {
      torch::jit::push(*stack, answer);
    }
  }
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  auto source = on_device(from) ? as_cpu(from) : from;
  auto target = on_device(to) ? as_cpu(to) : to;
  target.copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return as_cpu(tensor).item(); }

at::Tensor strided(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return result;
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  auto shaped = as_cpu(self).view(size);
  return strided(self, shaped.sizes(), shaped.strides(), self.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return strided(self, size, stride, self.storage_offset());
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  auto shaped = as_cpu(self).unfold(dimension, size, step);
  return strided(self, shaped.sizes(), shaped.strides(), shaped.storage_offset());
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto alias = as_cpu(self);
  alias.resize_(size, format);
  if (alias.storage().data() == self.storage().data()) {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    return self;
  }
  auto moved = as_device(alias);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() && !size.empty() ? at::empty(size).strides() : stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  auto length = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {length}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void check_one_device(const char* name, std::vector<at::Tensor> tensors) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(
        !tensor.defined() || on_device(tensor),
        "Expected all tensors to be on the same device, but found at least two devices, emulated:0 and cpu! (when ",
        "checking arguments in method ", name, ")");
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  check_one_device("convolution", {input, weight, bias.value_or(at::Tensor())});
  std::optional<at::Tensor> own;
  if (bias && bias->defined()) own = as_cpu(*bias);
  return as_device(at::convolution(
      as_cpu(input), as_cpu(weight), own, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  check_one_device("convolution_backward", {grad, input, weight});
  auto channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      as_cpu(grad), as_cpu(input), as_cpu(weight), c10::IntArrayRef({channels}), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  auto moved = [](const at::Tensor& tensor) { return tensor.defined() ? as_device(tensor) : tensor; };
  return {moved(of_input), moved(of_weight), moved(of_bias)};
}

// Recurrent layers of other devices than the CPU call these for each step.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& cell,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  auto gates = from_input + from_hidden;
  if (input_bias && input_bias->defined()) gates = gates + *input_bias + *hidden_bias;
  auto parts = gates.chunk(4, 1);
  auto next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& hidden,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  bool biased = input_bias && input_bias->defined();
  auto inputs = (biased ? from_input + *input_bias : from_input).chunk(3, 1);
  auto states = (biased ? from_hidden + *hidden_bias : from_hidden).chunk(3, 1);
  auto reset = (inputs[0] + states[0]).sigmoid();
  auto update = (inputs[1] + states[1]).sigmoid();
  auto proposed = (inputs[2] + reset * states[2]).tanh();
  return {(hidden - proposed) * update + proposed, update};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &strided);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  // Without autograd, as in inference mode.
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
}

// What CUDA's autocast computes in half precision, and what in single: the most common of its two lists.
const std::set<std::string> kInHalf = {
    "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::conv_transpose1d",
    "aten::conv_transpose2d.input", "aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm",
    "aten::baddbmm", "aten::einsum", "aten::_convolution", "aten::scaled_dot_product_attention", "aten::prelu"};
const std::set<std::string> kInSingle = {
    "aten::softmax", "aten::log_softmax", "aten::layer_norm", "aten::group_norm", "aten::nll_loss",
    "aten::cross_entropy_loss", "aten::mse_loss", "aten::l1_loss", "aten::smooth_l1_loss", "aten::exp", "aten::log",
    "aten::pow", "aten::rsqrt", "aten::sum", "aten::prod", "aten::norm", "aten::cumsum", "aten::softplus"};

void autocast(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  bool in_half = kInHalf.count(name) > 0;
  if (in_half || kInSingle.count(name)) {
    auto dtype = in_half ? at::autocast::get_autocast_dtype(kDevice) : at::kFloat;
    for (auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (argument.isTensor() && argument.toTensor().defined() && on_device(argument.toTensor()))
        const_cast<c10::IValue&>(argument) = at::autocast::cached_cast(dtype, argument.toTensor(), kDevice);
    }
  }
  c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&autocast>());
}

// Called from Python once the backend has its name.
int64_t begin() {
  static Hooks hooks;
  if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(&hooks);
  return 1;
}

// All bytes that were ever allocated, but for results of the CPU's kernels, whose memory is taken over.
int64_t allocated() { return allocated_bytes; }

TORCH_LIBRARY(emulated_device, m) {
  m.def("begin() -> int", &begin);
  m.def("allocated() -> int", &allocated);
}

}  // namespace
