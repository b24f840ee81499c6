// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/peer_memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "common/racy_copy.hpp"

#ifndef MADV_POPULATE_READ  // Linux 5.14; on older ones pages are mapped as they are touched
#define MADV_POPULATE_READ 22
#endif

namespace kvxfer::shm {

void prefetch_block(const std::byte* to, const std::byte* from, size_t nbytes) noexcept {
  constexpr size_t kLine = 64, kAhead = 8 * kLine;
  for (size_t at = 0; at < std::min(kAhead, nbytes); at += kLine) {
    __builtin_prefetch(from + at, 0);
    __builtin_prefetch(to + at, 1);
  }
}

void copy_pulls(const std::byte* base, std::span<const Pull> pulls) noexcept {
  for (size_t i = 0; i < pulls.size(); ++i) {
    if (i + 1 < pulls.size())
      prefetch_block(pulls[i + 1].to, base + pulls[i + 1].from, pulls[i + 1].nbytes);
    racy_copy(pulls[i].to, base + pulls[i].from, pulls[i].nbytes);
  }
}

Failure PeerMemory::ended(bool lease) {
  if (lease)
    return {.code = Code::kLease, .text = "the lease was revoked or has expired during the read"};
  return {.code = Code::kRemoteAccess, .text = "the region was deregistered during the read"};
}

namespace {

// Mapping pages one fault at a time halves the first copy, so they are mapped in the background.
class Populating {
 public:
  explicit Populating(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {
    if (mapping_->size() <= kPart) {
      part(0);
      return;
    }
    try {
      thread_ = std::thread([this] {
        for (size_t at = 0; at < mapping_->size() && !stop_.load(std::memory_order_relaxed);
             at += kPart)
          if (!part(at)) return;
      });
    } catch (const std::system_error&) {
      // No thread to be had: the pages are mapped as they are touched, only slower.
    }
  }
  ~Populating() {
    stop_.store(true, std::memory_order_relaxed);  // advice: the join orders everything
    if (thread_.joinable()) thread_.join();
  }
  const Mapping& mapping() const noexcept { return *mapping_; }

 private:
  static constexpr size_t kPart = size_t{4} << 20;  // under a millisecond to wait for
  bool part(size_t at) const noexcept {
    return ::madvise(mapping_->data() + at, std::min(kPart, mapping_->size() - at),
                     MADV_POPULATE_READ) == 0;
  }
  const std::shared_ptr<Mapping> mapping_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// The peer's words, shared by all of its regions; empty until it has shown them.
struct PeerWords {
  std::shared_ptr<Mapping> mapping;
  bool closed(const WordRef& word) const noexcept {
    return word.index != WordRef::kNone && (!mapping || !still_open(mapping->data(), word));
  }
};
using WordsPtr = std::shared_ptr<PeerWords>;

class MappedMemory final : public PeerMemory {
 public:
  MappedMemory(uint64_t nbytes, std::shared_ptr<Mapping> mapping, WordsPtr words)
      : PeerMemory(nbytes), pages_(std::move(mapping)), words_(std::move(words)) {}

  std::optional<Failure> pull(std::span<const Pull> pulls, const Watch& watch) noexcept override {
    copy_pulls(pages_.mapping().data(), pulls);
    if (words_->closed(watch.lease)) return ended(true);
    if (words_->closed(watch.region)) return ended(false);
    return {};
  }

 private:
  Populating pages_;
  const WordsPtr words_;
};

class MappedReach final : public Reach {
 public:
  std::string_view transport() const noexcept override { return "shm"; }
  std::string describe() const override {
    return "allocated memory is mapped, registered memory is staged";
  }
  bool can_show(const Region& region) const noexcept override {
    return region.memfd && region.shareable && region.pieces.size() == 1;
  }
  Bytes show(const Region& region, int& fd) const override {
    fd = region.memfd.get();
    return {};
  }
  Bytes show(const ExportedWords& words, int& fd) const override {
    fd = words.fd();
    return {};
  }
  std::shared_ptr<PeerMemory> take(uint64_t nbytes, ByteView shown, Fd fd,
                                   std::string& reason) override {
    if (!shown.empty() || !fd) return reason = "a region without its descriptor", nullptr;
    auto mapping = map_peer_readonly(fd.get(), nbytes, reason);
    return mapping ? std::make_shared<MappedMemory>(nbytes, std::move(mapping), words_) : nullptr;
  }
  bool take_words(ByteView shown, Fd fd, std::string& reason) override {
    if (!shown.empty() || !fd || words_->mapping) return reason = "words shown wrongly", false;
    words_->mapping = map_peer_readonly(fd.get(), ExportedWords::kBytes, reason);
    return words_->mapping != nullptr;
  }

 private:
  const WordsPtr words_ = std::make_shared<PeerWords>();
};

}  // namespace

std::unique_ptr<Reach> make_mapped_reach() { return std::make_unique<MappedReach>(); }

}  // namespace kvxfer::shm
