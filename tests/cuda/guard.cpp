// The least that PyTorch asks of a CUDA runtime: how many devices there are and which one is current. Nothing runs on them.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kNumDevices = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device device(c10::DeviceIndex index) {
  return c10::Device(c10::DeviceType::CUDA, index);
}

// Autograd starts a thread for every device that a guard knows, and makes it current there.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
  c10::Device getDevice() const override { return device(current); }
  void setDevice(c10::Device to) const override { current = to.has_index() ? to.index() : current; }
  void uncheckedSetDevice(c10::Device to) const noexcept override { current = to.has_index() ? to.index() : current; }
  c10::Device exchangeDevice(c10::Device to) const override {
    const auto before = getDevice();
    setDevice(to);
    return before;
  }
  // All work is done when it is asked for, so one stream a device is enough.
  c10::Stream getStream(c10::Device of) const override {
    return c10::Stream(c10::Stream::DEFAULT, of.has_index() ? of : getDevice());
  }
  c10::Stream getNewStream(c10::Device of, int) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());

}  // namespace

// Registered by this name: PyTorch makes its hooks from it, once.
namespace pretended {

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kNumDevices; }
  c10::DeviceIndex deviceCount() const override { return kNumDevices; }
  c10::DeviceIndex current_device() const override { return current; }
};

}  // namespace pretended

namespace at {
using pretended::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

extern "C" int pretended_current_device() { return current; }
extern "C" void pretended_set_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
