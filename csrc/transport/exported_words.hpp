// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Words by which readers in other processes learn that a lease or a region has ended: a sealed
// page run that only its engine writes and that peers may map to read.
//
// A seqlock whose writer never waits. The reader copies, acquires, then looks at the word; the
// owner changes the word, a full fence, then reuses the memory. A reader that copied a byte which
// was stored afterwards therefore sees the changed word, and fails.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/shm/segment.hpp"

namespace kvxfer {

// Where a reader finds a word and what stands there while the memory may be read.
struct WordRef {
  static constexpr uint32_t kNone = 0xffffffff;
  uint32_t index = kNone;
  uint32_t reserved = 0;
  uint64_t value = 0;
};

class ExportedWords;

// One word, open until close(). Its index is used again, its value never.
class ExportedWord {
 public:
  ExportedWord() = default;
  ExportedWord(ExportedWord&& other) noexcept = default;
  ExportedWord& operator=(ExportedWord&& other) noexcept;
  ~ExportedWord();

  explicit operator bool() const noexcept { return words_ != nullptr; }
  const WordRef& ref() const noexcept { return ref_; }
  const std::shared_ptr<ExportedWords>& words() const noexcept { return words_; }
  // Any thread, any number of times. When it returns, memory that the word stood for may be reused.
  void close() noexcept;

 private:
  friend class ExportedWords;
  std::shared_ptr<ExportedWords> words_;
  WordRef ref_;
};

class ExportedWords : public std::enable_shared_from_this<ExportedWords> {
 public:
  static constexpr uint32_t kNum = 65536;  // pages come into being as they are used
  static constexpr size_t kBytes = size_t{kNum} * sizeof(uint64_t);

  ExportedWords();  // throws RegistrationError
  // Empty when all are in use: reads of that lease then go through its owner.
  ExportedWord take();
  int fd() const noexcept { return segment_.fd.get(); }
  const std::byte* base() const noexcept { return segment_.mapping->data(); }

 private:
  friend class ExportedWord;
  // Written by our process only (release of everything before the memory's reuse), read by any.
  std::atomic<uint64_t>& at(uint32_t index) noexcept {
    return reinterpret_cast<std::atomic<uint64_t>*>(segment_.mapping->data())[index];
  }
  void close(const WordRef& word) noexcept;
  void give_back(uint32_t index) noexcept;

  shm::Segment segment_;
  const pid_t owner_;  // the mapping is not there in a forked child, whose copies end nothing
  std::mutex mutex_;   // over the two below
  std::vector<uint32_t> free_;
  uint32_t num_used_ = 0;
};

// The reader's half, after its copy: whether the memory was still open when the copy ended. `base`
// is its own mapping of the words.
bool still_open(const std::byte* base, const WordRef& word) noexcept;

}  // namespace kvxfer
