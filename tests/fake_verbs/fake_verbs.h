/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0 */
/* libfake_verbs.so: libibverbs with NICs made of software, so that verbs code runs, and fails,
 * anywhere. It exports the entry points of libibverbs by their names; a program opens it in place
 * of libibverbs.so.1 (kvxfer: environment variable KVXFER_LIBIBVERBS), or links it.
 *
 * What the NICs are and what goes wrong with them is told by KVXFER_FAKE_VERBS, read once; the
 * words are in plan.hpp. Processes reach each other when KVXFER_FAKE_VERBS_NET is the same
 * (by default the user's uid). These functions are for tests that hold the moment in their hands;
 * they may be called from any thread. */
#ifndef KVXFER_FAKE_VERBS_H
#define KVXFER_FAKE_VERBS_H

#include <infiniband/verbs.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Replaces the plan from now on; devices that were listed before keep their ports and addresses.
 * There are as many as KVXFER_FAKE_VERBS says, unless the plan says how many: more are made, fewer
 * are listed. 0, or EINVAL with the reason on stderr. */
int fake_verbs_plan(const char* plan);

/* Packets to this QP number, of this process, wait until released, in order. Judged on delivery:
 * what the QP, the key or the window was when they were sent does not matter. */
void fake_verbs_hold(uint32_t qp_num);
void fake_verbs_release(uint32_t qp_num);
/* Lets so many of them through and goes on holding; no more than wait now. */
void fake_verbs_pass(uint32_t qp_num, int num_packets);
int fake_verbs_num_held(uint32_t qp_num); /* that wait now */

/* The next request that this QP begins ends with `status`: half of the time before anything was
 * sent, half of the time after all of it has landed. */
void fake_verbs_fail_next(uint32_t qp_num, enum ibv_wc_status status);

/* For peers that break a protocol: what this process SENDs goes by `tamper` first. Either 0, and it
 * is sent as it is, or it is replaced by what was said, any number of messages of this queue pair,
 * in order. Called in ibv_post_send, where no verb and no function of this file may be called.
 * NULL: honest again. */
typedef void (*fake_verbs_say)(void* to, const void* bytes, uint32_t nbytes);
typedef int (*fake_verbs_tamperer)(uint32_t qp_num, const void* bytes, uint32_t nbytes,
                                   fake_verbs_say say, void* to);
void fake_verbs_tamper(fake_verbs_tamperer tamper);

/* The QP breaks: ERR and IBV_EVENT_QP_FATAL. ENOENT. */
int fake_verbs_break_qp(uint32_t qp_num);

/* The CQ of this QP has room for no more than it holds: the next completion overruns it. ENOENT. */
int fake_verbs_overrun_cq(uint32_t qp_num);

/* The link of a port goes or comes, with the event; packets are lost while it is away. ENODEV. */
int fake_verbs_set_port(const char* device, int port, int up);

/* What goes over a port is lost from here on, or gets through again; no port, event or counter says
 * so: a switch somewhere has failed. ENODEV. */
int fake_verbs_cut_port(const char* device, int port, int cut);

/* The device is gone: IBV_EVENT_DEVICE_FATAL, then every verb on it fails with EIO. ENODEV. */
int fake_verbs_remove_device(const char* device);
/* Another device of this name takes its place, with the counts of the plan. ENODEV. */
int fake_verbs_restore_device(const char* device);

/* A count since the process began, or -1 for an unknown name: work_requests, doorbells, receives,
 * packets, retransmissions, failed_calls, timeouts, rnr_naks, completions, events, binds,
 * bytes_placed, dropped, duplicated, delayed, acks_lost, qps, regions, windows, cqs, locked_bytes,
 * registering (held by the plan), inline (work requests), writable_regions (that are there now and
 * were registered with IBV_ACCESS_REMOTE_WRITE), dirty_destroys: queue pairs that were destroyed or
 * RESET before their user had polled the end of all that it had posted there, sends and,
 * if anything had come or gone there, receives; unless the queue pair had been in ERR for 100 ms,
 * or a call that would have ended it was refused. */
int64_t fake_verbs_count(const char* name);

#ifdef __cplusplus
}
#endif
#endif
