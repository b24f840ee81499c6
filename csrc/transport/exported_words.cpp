// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/exported_words.hpp"

#include <unistd.h>

#include <utility>

namespace kvxfer {

static_assert(std::atomic<uint64_t>::is_always_lock_free);

ExportedWords::ExportedWords()
    : segment_(shm::make_owned("kvxfer-words", kBytes)), owner_(::getpid()) {}

ExportedWord ExportedWords::take() {
  ExportedWord word;
  std::lock_guard lock(mutex_);
  uint32_t index = num_used_;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else if (num_used_ == kNum) {
    return word;
  } else {
    ++num_used_;
  }
  // Relaxed: a reader learns index and value by a message, which publishes this.
  const uint64_t value = at(index).load(std::memory_order_relaxed) + 1;
  at(index).store(value, std::memory_order_relaxed);
  word.words_ = shared_from_this();
  word.ref_ = {index, 0, value};
  return word;
}

void ExportedWords::close(const WordRef& word) noexcept {
  if (::getpid() != owner_) return;
  uint64_t open = word.value;  // compared, so that a second close cannot end its successor
  at(word.index).compare_exchange_strong(open, word.value + 1, std::memory_order_seq_cst);
#ifndef __SANITIZE_THREAD__  // which does not know fences; there the exchange is one
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

void ExportedWords::give_back(uint32_t index) noexcept {
  if (::getpid() != owner_) return;
  std::lock_guard lock(mutex_);
  free_.push_back(index);
}

ExportedWord& ExportedWord::operator=(ExportedWord&& other) noexcept {
  std::swap(words_, other.words_);
  std::swap(ref_, other.ref_);
  return *this;
}

void ExportedWord::close() noexcept {
  if (words_) words_->close(ref_);
}

ExportedWord::~ExportedWord() {
  if (!words_) return;
  words_->close(ref_);
  words_->give_back(ref_.index);
}

bool still_open(const std::byte* base, const WordRef& word) noexcept {
  if (word.index >= ExportedWords::kNum) return false;
  const auto& at = reinterpret_cast<const std::atomic<uint64_t>*>(base)[word.index];
#ifdef __SANITIZE_THREAD__
  return at.load(std::memory_order_seq_cst) == word.value;
#else
  std::atomic_thread_fence(std::memory_order_acquire);  // the copy's loads come first
  return at.load(std::memory_order_relaxed) == word.value;
#endif
}

}  // namespace kvxfer
