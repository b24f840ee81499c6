// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Entry points: completion channels and queues, queue pairs made and destroyed.
#include "exports.hpp"
#include "nic.hpp"

using namespace fake_verbs;

namespace {

// Destroying waits until every event that was taken out has been acknowledged.
template <typename Object>
void await_acknowledgements(Object& object, const uint32_t& completed, uint32_t given) {
  pthread_mutex_lock(&object.mutex);
  while (completed != given) pthread_cond_wait(&object.cond, &object.mutex);
  pthread_mutex_unlock(&object.mutex);
}

template <typename Object>
void init(Object& object) {
  pthread_mutex_init(&object.mutex, nullptr);
  pthread_cond_init(&object.cond, nullptr);
}

template <typename Object>
void discard(Object& object) {
  pthread_mutex_destroy(&object.mutex);
  pthread_cond_destroy(&object.cond);
}

}  // namespace

FAKE_VERBS_EXPORT ibv_comp_channel* ibv_create_comp_channel(ibv_context* base) {
  Nic& nic = Nic::get();
  Context& context = context_of(base);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("create_comp_channel", *context.of))
    return fail_pointer<ibv_comp_channel>(err);
  auto channel = std::make_unique<Channel>();
  channel->context = base;
  channel->fd = channel->events.fd();
  channel->refcnt = 0;
  ibv_comp_channel* const out = channel.get();
  context.channels[out] = std::move(channel);
  return out;
}

FAKE_VERBS_EXPORT int ibv_destroy_comp_channel(ibv_comp_channel* channel) {
  Nic& nic = Nic::get();
  Context& context = context_of(channel->context);
  const auto lock = nic.lock();
  if (channel->refcnt > 0) return fail_int(EBUSY);
  context.channels.erase(channel);
  return 0;
}

FAKE_VERBS_EXPORT ibv_cq* ibv_create_cq(ibv_context* base, int cqe, void* cq_context,
                                        ibv_comp_channel* channel, int vector) {
  Nic& nic = Nic::get();
  Context& context = context_of(base);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("create_cq", *context.of)) return fail_pointer<ibv_cq>(err);
  if (cqe < 1 || cqe > nic.plan.max_cqe || vector < 0 || vector >= base->num_comp_vectors)
    return fail_pointer<ibv_cq>(EINVAL);
  if (cqe > nic.limit(nic.plan.max_cqe)) return fail_pointer<ibv_cq>(ENOMEM);
  auto cq = std::make_unique<CompletionQueue>();
  cq->context = base;
  cq->channel = channel;
  cq->cq_context = cq_context;
  cq->cqe = cqe;  // real ones round up, and nobody may count on it
  init(*cq);
  if (channel) ++channel->refcnt;
  ibv_cq* const out = cq.get();
  context.cqs[out] = std::move(cq);
  return out;
}

FAKE_VERBS_EXPORT int ibv_resize_cq(ibv_cq* base, int cqe) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("resize_cq", *context_of(base->context).of)) return fail_int(err);
  auto& cq = *static_cast<CompletionQueue*>(base);
  if (cqe < 1 || cqe > nic.limit(nic.plan.max_cqe) || cqe < static_cast<int>(cq.entries.size()))
    return fail_int(EINVAL);
  cq.cqe = cqe;
  return 0;
}

FAKE_VERBS_EXPORT int ibv_destroy_cq(ibv_cq* base) {
  Nic& nic = Nic::get();
  Context& context = context_of(base->context);
  auto& cq = *static_cast<CompletionQueue*>(base);
  uint32_t comp_given = 0, async_given = 0;
  {
    const auto lock = nic.lock();
    if (const int err = nic.refuse("destroy_cq", *context.of)) return fail_int(err);
    if (cq.queue_pairs > 0) return fail_int(EBUSY);
    cq.armed = CompletionQueue::Armed::kNo;
    nic.forget(cq);
    context.async.remove_if(
        [&](const ibv_async_event& event) { return is_of_cq(event) && event.element.cq == &cq; });
    comp_given = cq.comp_events_given;
    async_given = cq.async_events_given;
    if (cq.channel) --cq.channel->refcnt;
  }
  await_acknowledgements(cq, cq.comp_events_completed, comp_given);
  await_acknowledgements(cq, cq.async_events_completed, async_given);
  discard(cq);
  const auto lock = nic.lock();
  context.cqs.erase(base);
  return 0;
}

FAKE_VERBS_EXPORT int ibv_get_cq_event(ibv_comp_channel* base, ibv_cq** cq, void** cq_context) {
  Nic& nic = Nic::get();
  CompEvent event;
  const int err = static_cast<Channel*>(base)->events.pop(
      [&] { return nic.lock(); }, event, [](CompEvent& e) { ++e.cq->comp_events_given; });
  if (err) return fail_int(err), -1;
  *cq = event.cq;
  *cq_context = event.cq->cq_context;
  return 0;
}

FAKE_VERBS_EXPORT void ibv_ack_cq_events(ibv_cq* cq, unsigned num_events) {
  pthread_mutex_lock(&cq->mutex);
  cq->comp_events_completed += num_events;
  pthread_cond_signal(&cq->cond);
  pthread_mutex_unlock(&cq->mutex);
}

FAKE_VERBS_EXPORT ibv_qp* ibv_create_qp(ibv_pd* pd, ibv_qp_init_attr* init_attr) {
  Nic& nic = Nic::get();
  Context& context = context_of(pd->context);
  const auto lock = nic.lock();
  const auto fail = [](int err) { return fail_pointer<ibv_qp>(err); };
  if (const int err = nic.refuse("create_qp", *context.of)) return fail(err);
  const ibv_qp_cap& cap = init_attr->cap;
  const Plan& plan = nic.plan;
  if (init_attr->qp_type != IBV_QPT_RC || init_attr->srq) return fail(EOPNOTSUPP);
  if (!init_attr->send_cq || !init_attr->recv_cq) return fail(EINVAL);
  const auto above = [](uint32_t asked, int limit) { return asked > static_cast<uint32_t>(limit); };
  if (above(cap.max_send_wr, plan.max_qp_wr) || above(cap.max_recv_wr, plan.max_qp_wr))
    return fail(EINVAL);
  if (above(cap.max_send_wr, nic.limit(plan.max_qp_wr)) ||
      above(cap.max_recv_wr, nic.limit(plan.max_qp_wr)))
    return fail(ENOMEM);
  if (above(cap.max_send_sge, nic.limit(plan.max_sge)) ||
      above(cap.max_recv_sge, nic.limit(plan.max_sge)) ||
      above(cap.max_inline_data, nic.limit(plan.max_inline)))
    return fail(EINVAL);
  auto qp = std::make_unique<QueuePair>();
  qp->context = pd->context;
  qp->qp_context = init_attr->qp_context;
  qp->pd = pd;
  qp->send_cq = init_attr->send_cq;
  qp->recv_cq = init_attr->recv_cq;
  qp->qp_type = init_attr->qp_type;
  qp->state = IBV_QPS_RESET;
  qp->cap = cap;  // no more than asked for, though real ones round up
  qp->signal_all = init_attr->sq_sig_all != 0;
  init(*qp);
  qp->qp_num = nic.add(*qp);
  if (qp->qp_num == 0) return fail(ENOMEM);
  qp->handle = qp->qp_num;
  ++static_cast<Domain*>(pd)->users;
  ++static_cast<CompletionQueue*>(qp->send_cq)->queue_pairs;
  ++static_cast<CompletionQueue*>(qp->recv_cq)->queue_pairs;
  ibv_qp* const out = qp.get();
  context.qps[out] = std::move(qp);
  return out;
}

FAKE_VERBS_EXPORT int ibv_destroy_qp(ibv_qp* base) {
  Nic& nic = Nic::get();
  Context& context = context_of(base->context);
  auto& qp = *static_cast<QueuePair*>(base);
  uint32_t given = 0;
  {
    const auto lock = nic.lock();
    if (const int err = nic.refuse("destroy_qp", *context.of)) return fail_int(err);
    nic.note_end(qp);
    nic.remove(qp);
    context.of->keys.unbind_all(qp);
    context.async.remove_if(
        [&](const ibv_async_event& event) { return is_of_qp(event) && event.element.qp == &qp; });
    given = qp.async_events_given;
    --static_cast<Domain*>(qp.pd)->users;
    --static_cast<CompletionQueue*>(qp.send_cq)->queue_pairs;
    --static_cast<CompletionQueue*>(qp.recv_cq)->queue_pairs;
  }
  await_acknowledgements(qp, qp.events_completed, given);
  discard(qp);
  const auto lock = nic.lock();
  context.qps.erase(base);
  return 0;
}
