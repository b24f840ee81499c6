// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which NIC some memory goes over: as sysfs tells of PCI bridges, root complexes and NUMA nodes.
// Here sysfs is a tree of folders and links like the kernel's.
#include <filesystem>
#include <fstream>
#include <string>

#include "eventually.hpp"
#include "gpu_world.hpp"
#include "transport/verbs/nearness.hpp"
#include "transport/verbs/preference.hpp"
#include "verbs_rails_world.hpp"

using namespace kvxfer;
using verbs::nearness;
using verbs::Place;
using verbs::place_of;

namespace {

struct Sysfs {
  std::filesystem::path root;

  Sysfs() {
    char folder[] = "/tmp/kvxfer-sysfs-XXXXXX";
    REQUIRE(::mkdtemp(folder) != nullptr);
    root = folder;
    std::filesystem::create_directories(root / "bus" / "devices");
  }
  ~Sysfs() { std::filesystem::remove_all(root); }

  // "pci0000:3a/0000:3a:01.0/0000:3b:00.0", listed by its bus.
  std::string add(const std::string& wired, int node) const {
    const auto folder = root / "devices" / wired;
    std::filesystem::create_directories(folder);
    std::ofstream(folder / "numa_node") << node << "\n";
    std::filesystem::create_directory_symlink(root / "bus", folder / "subsystem");
    std::filesystem::create_directory_symlink(folder, root / "bus" / "devices" / folder.filename());
    return (root / "bus" / "devices" / folder.filename()).string();
  }
  void add_nic(const std::string& name, const std::string& wired, int node) const {
    const std::string device = add(wired, node);
    std::filesystem::create_directories(root / name);
    std::filesystem::create_directory_symlink(device, root / name / "device");
  }
};

}  // namespace

TEST_CASE("nearness: what sysfs says of a device, through links") {
  const Sysfs sysfs;
  CHECK(place_of(sysfs.root / "nothing").node == verbs::kNoNode);
  CHECK(place_of(sysfs.root / "nothing").path.empty());
  const Place place = place_of(sysfs.add("pci0000:3a/0000:3a:01.0/0000:3b:00.0", 3));
  CHECK(place.node == 3);
  CHECK(place.path == std::vector<std::string>{"pci0000:3a", "0000:3a:01.0", "0000:3b:00.0"});
  CHECK(place.text() == "NUMA node 3, PCI pci0000:3a/0000:3a:01.0/0000:3b:00.0");
  // The kernel's word where firmware tells nothing.
  CHECK(place_of(sysfs.add("pci0000:00/0000:00:05.0", -1)).node == verbs::kNoNode);
  // Another bus, as that of Soft-RoCE or of a virtual machine's own devices.
  const Place other = place_of(sysfs.add("vmbus/nic", 1));
  CHECK(other.path.empty());
  CHECK(other.text() == "NUMA node 1");
  CHECK(Place{}.text() == "NUMA node unknown");
  verbs::NodeOfMemory none;
  CHECK(none.node() == verbs::kNoNode);
}

TEST_CASE("nearness: a bridge is nearer than a root complex, that than a node, that than others") {
  const Place gpu{.node = 0, .path = {"pci0000:3a", "3a:01.0", "3b:00.0", "3c:04.0", "3d:00.0"}};
  const auto of = [&](int node, std::vector<std::string> path) {
    return nearness({.node = node, .path = std::move(path)}, gpu);
  };
  // A switch is one bridge upstream and one for each way down.
  const auto same = of(0, {"pci0000:3a", "3a:01.0", "3b:00.0", "3c:08.0", "3e:00.0"});
  const auto outer = of(0, {"pci0000:3a", "3a:01.0", "3f:00.0"});
  const auto root = of(0, {"pci0000:3a", "3a:02.0", "40:00.0"});
  const auto node = of(0, {"pci0000:80", "80:01.0", "81:00.0"});
  const auto other = of(1, {"pci0000:c0", "c0:01.0", "c1:00.0"});
  CHECK(same.what == "behind PCI bridge 3b:00.0");
  CHECK(outer.what == "behind PCI bridge 3a:01.0");
  CHECK(root.what == "under root complex pci0000:3a");
  CHECK(node.what == "at NUMA node 0");
  CHECK(other.what.empty());
  CHECK(same.rank > outer.rank);
  CHECK(outer.rank > root.rank);
  CHECK(root.rank > node.rank);
  CHECK(node.rank > other.rank);
  CHECK(other.rank == 0);
  // A bridge of a NIC's own makes it no farther.
  CHECK(of(0, {"pci0000:3a", "3a:01.0", "3b:00.0", "3c:08.0", "3e:00.0", "3f:00.0"}).rank ==
        same.rank);
  // A device is no bridge to itself, nor to one that hangs below it.
  CHECK(nearness({.path = {"pci0000:00", "00:05.0"}}, {.path = {"pci0000:00", "00:05.0"}}).rank ==
        2);
  // What is unknown is not the same.
  CHECK(nearness({}, {}).rank == 0);
  CHECK(nearness({.node = 0}, {}).rank == 0);
  CHECK(nearness({.node = 0}, {.node = 0}).rank == 1);
}

namespace {

// Two GPUs with NICs of their own, one NIC at another root port, and one that only its node joins:
//   pci0000:3a - 3a:01.0 - GPU 0, fake0, fake1       pci0000:80 - 80:01.0 - GPU 1, fake4
//              - 3a:02.0 - fake2                      pci0000:60 - 60:01.0 - fake3
struct TwoGpus : Sysfs, rails::Whole {
  TwoGpus() {
    add("pci0000:3a/0000:3a:01.0/0000:3b:00.0", 0);
    add("pci0000:80/0000:80:01.0/0000:81:00.0", 1);
    const char* const wired[] = {
        "pci0000:3a/0000:3a:01.0/0000:3c:00.0", "pci0000:3a/0000:3a:01.0/0000:3c:00.1",
        "pci0000:3a/0000:3a:02.0/0000:3d:00.0", "pci0000:60/0000:60:01.0/0000:61:00.0",
        "pci0000:80/0000:80:01.0/0000:82:00.0"};
    for (int i = 0; i < kNics; ++i) add_nic(nic(i), wired[i], i < 4 ? 0 : 1);
    remake("devices=5 sysfs=" + root.string());
  }
  ~TwoGpus() {
    for (int i = 0; i < kNics; ++i) fake_verbs_set_port(nic(i).c_str(), 1, 1);
    remake("devices=5");
    fake_verbs_plan("");
  }
  static void remake(const std::string& plan) {
    REQUIRE(fake_verbs_plan(plan.c_str()) == 0);
    for (int i = 0; i < kNics; ++i) {
      REQUIRE(fake_verbs_remove_device(nic(i).c_str()) == 0);
      REQUIRE(fake_verbs_restore_device(nic(i).c_str()) == 0);
    }
  }
  static std::string nic(int i) { return "fake" + std::to_string(i); }
  static constexpr int kNics = 5;
};

struct NearPair : GpuPair {
  PeerPtr to_a;
  NearPair() {
    REQUIRE(eventually_within(20, [this] {
      for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
      return to_a != nullptr && in_use(to_a, 5) && in_use(to_b, 5);
    }));
  }
  static bool in_use(const PeerPtr& peer, size_t num) {
    const auto rails = rails::connection_of(peer).carried();
    return static_cast<size_t>(
               std::ranges::count_if(rails, [](const auto& rail) { return rail.in_use; })) == num;
  }
  // The rails that carry chains of a write, or a read where `op` is one.
  std::string over(Op op, const RegionPtr& local, const RemoteRegionPtr& there,
                   const LeasePtr& lease = nullptr) {
    const bool pushed = op == Op::kWrite && lease && std::getenv("KVXFER_TEST_VERBS_PUSH");
    const PeerPtr& who = op == Op::kRead || pushed ? to_b : to_a;
    const auto chains = [&] {
      std::vector<uint64_t> out;
      for (const auto& rail : rails::connection_of(who).carried())
        out.push_back(pushed ? rail.chains_pushed : rail.chains);
      return out;
    };
    const auto before = chains();
    finish(move(op, local, there, 0, 0, static_cast<int64_t>(local->nbytes), lease));
    const auto after = chains();
    std::string out;
    for (size_t i = 0; i < after.size(); ++i)
      if (after[i] > before[i]) out += cat(i);
    return out;
  }
  // Never over another; but one of two that are alike may have had nothing to do.
  bool goes_over(const std::string& rails, Op op, const RegionPtr& local,
                 const RemoteRegionPtr& there) {
    return eventually_within(20, [&] {
      const std::string went = over(op, local, there);
      CHECK(went.find_first_not_of(rails) == std::string::npos);
      return went == rails;
    });
  }
};

}  // namespace

TEST_CASE("nearness: each GPU's memory goes over its own NICs, and over the next when they fail") {
  const TwoGpus machine;
  NearPair w;
  constexpr size_t kSize = 8 << 20;
  const GpuMemory memory0(kSize, 0), memory1(kSize, 1), memory2(kSize, 0), memory3(kSize, 1);
  const RegionPtr at0 = on_gpu(*w.b, {memory0.piece()}, "at0"),
                  at1 = on_gpu(*w.b, {memory1.piece()}, "at1"),
                  from0 = on_gpu(*w.a, {memory2.piece()}, "from0"),
                  from1 = on_gpu(*w.a, {memory3.piece()}, "from1");
  const auto to0 = w.remote("at0"), to1 = w.remote("at1");
  CHECK(says(at0,
             "prefers fake0:1, fake1:1 (behind PCI bridge 0000:3a:01.0) to fake2:1 (under root "
             "complex pci0000:3a) to fake3:1 (at NUMA node 0) to fake4:1 (elsewhere, or unknown)"));
  CHECK(says(at1,
             "prefers fake4:1 (behind PCI bridge 0000:80:01.0) to fake0:1, fake1:1, fake2:1, "
             "fake3:1 (elsewhere, or unknown)"));
  const std::string text = w.a->explain(*w.to_b);
  for (const char* what :
       {"our region 'from0': verbs has registered memory of cuda:0 by dma-buf; prefers fake0:1, ",
        "rail 4: fake4:1, NUMA node 1, PCI pci0000:80/0000:80:01.0/0000:82:00.0"})
    CHECK_MESSAGE(text.find(what) != std::string::npos, what, " in ", text);

  // Who pulls decides by its own memory; so does who pushes.
  CHECK(w.goes_over("01", Op::kWrite, from0, to0));
  CHECK(w.goes_over("4", Op::kWrite, from0, to1));
  CHECK(w.goes_over("01", Op::kRead, from0, to1));
  CHECK(w.goes_over("4", Op::kRead, from1, to0));
  const bool pushes = std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr;
  // A rail pushes once the owner has told its key of the window; until then others may.
  CHECK(eventually_within(20, [&, lease = whole(*w.b, at0)] {
    return w.over(Op::kWrite, from1, to0, lease) == (pushes ? "4" : "01");
  }));

  // Down to what is farther, step by step.
  size_t left = TwoGpus::kNics;
  const auto lose = [&](int nic) {
    REQUIRE(fake_verbs_set_port(TwoGpus::nic(nic).c_str(), 1, 0) == 0);
    --left;
    REQUIRE(eventually_within(
        20, [&] { return NearPair::in_use(w.to_a, left) && NearPair::in_use(w.to_b, left); }));
  };
  lose(0);
  CHECK(w.goes_over("1", Op::kWrite, from0, to0));
  lose(1);
  CHECK(w.goes_over("2", Op::kWrite, from0, to0));
  lose(2);
  CHECK(w.goes_over("3", Op::kWrite, from0, to0));
  lose(3);
  CHECK(w.goes_over("4", Op::kWrite, from0, to0));
}

TEST_CASE("nearness: devices that are named are used alike") {
  const TwoGpus machine;
  EngineOptions options = gpu_options("a", {"verbs"});
  options.transport.verbs_device = "fake0,fake4";
  const auto a = Engine::create(options);
  options.name = "b";
  const auto b = Engine::create(options);
  const GpuMemory from(8 << 20), to(8 << 20);
  const RegionPtr source = on_gpu(*a, {from.piece()}), target = on_gpu(*b, {to.piece()}, "kv");
  CHECK_FALSE(says(target, "prefers"));
  const PeerPtr to_b = a->connect(b->address(), 10);
  REQUIRE(eventually_within(20, [&] { return NearPair::in_use(to_b, 2); }));
  RemoteRegionPtr there;
  REQUIRE(eventually_within(20, [&] {
    for (const auto& [name, region] : a->regions_of(*to_b)) there = region;
    return there != nullptr;
  }));
  const int64_t at = 0, nbytes = 8 << 20;
  SubmitOptions patient;
  patient.deadline_ns = deadline_after(30);
  const SpanArguments all{{&at, 1, true}, {&at, 1, true}, {&nbytes, 1, true}, {}, false};
  finish(a->submit(Op::kRead, source, there, all, patient));
  for (const auto& rail : rails::connection_of(to_b).carried()) CHECK(rail.chains > 0);
  a->close();
  b->close();
  check_ended_in_order();
}
