// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "device_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "../fake_cuda/fake_cuda_dmabuf.h"

namespace fake_verbs {

bool map_dmabuf(int fd, uint64_t offset, size_t length, Mapped& out) {
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const int64_t position = ::lseek(fd, 0, SEEK_CUR);
  if (position < 0) return false;
  struct stat file{};
  if (::fstat(fd, &file) != 0) return false;
  const uint64_t first = static_cast<uint64_t>(fake_dmabuf_first(position)) * page;
  const uint64_t size = position == 0 ? static_cast<uint64_t>(file.st_size)
                                      : static_cast<uint64_t>(fake_dmabuf_count(position)) * page;
  if (length > size || offset > size - length) {
    errno = EINVAL;
    return false;
  }
  out.before = offset % page;
  out.nbytes = length + out.before;
  out.at = ::mmap(nullptr, out.nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                  static_cast<off_t>(first + offset - out.before));
  return out.at != MAP_FAILED;
}

bool find_gpus(const void* address, size_t length, int& fd, uint64_t& offset) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(FAKE_CUDA_FILE) == std::string::npos) continue;
    unsigned long first = 0, end = 0, begin = 0, inode = 0;
    char rights[8] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %7s %lx %*s %lu", &first, &end, rights, &begin,
                    &inode) != 5)
      continue;
    if (rights[0] != '-' || at < first || at >= end || length > end - at) continue;
    // Somebody here still has the file open: the GPU.
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", none)) {
      struct stat file{};
      if (std::filesystem::read_symlink(entry.path(), none).string().find(FAKE_CUDA_FILE) ==
          std::string::npos)
        continue;
      if (::stat(entry.path().c_str(), &file) != 0 || file.st_ino != inode) continue;
      fd = ::open(entry.path().c_str(), O_RDWR | O_CLOEXEC);
      if (fd < 0) continue;
      offset = begin + (at - first);
      return true;
    }
  }
  return false;
}

}  // namespace fake_verbs
