; ModuleID = 'pool.c'
source_filename = "pool.c"
target datalayout = "e-m:e-i8:8:32-i16:16:32-i64:64-i128:128-n32:64-S128-Fn32"
target triple = "aarch64-unknown-linux-gnu"

%struct.worker = type { [64 x i8], i64, ptr, i32, i32, [40 x i8] }

; Function Attrs: nounwind
define void @qc_wait(ptr nocapture noundef %0) local_unnamed_addr #0 {
  %2 = load i32, ptr %0, align 64, !tbaa !3
  %3 = icmp slt i32 %2, 2
  br i1 %3, label %27, label %4

4:                                                ; preds = %1
  %5 = getelementptr inbounds i8, ptr %0, i64 192
  %6 = load atomic i32, ptr %5 monotonic, align 64
  %7 = getelementptr inbounds i8, ptr %0, i64 128
  %8 = atomicrmw add ptr %7, i32 1 acq_rel, align 64
  %9 = add i32 %8, 1
  %10 = load i32, ptr %0, align 64, !tbaa !3
  %11 = icmp eq i32 %9, %10
  br i1 %11, label %15, label %12

12:                                               ; preds = %4
  %13 = load atomic i32, ptr %5 acquire, align 64
  %14 = icmp eq i32 %13, %6
  br i1 %14, label %17, label %27

15:                                               ; preds = %4
  store atomic i32 0, ptr %7 monotonic, align 64
  %16 = add i32 %6, 1
  store atomic i32 %16, ptr %5 release, align 64
  br label %27

17:                                               ; preds = %12, %23
  %18 = phi i32 [ %24, %23 ], [ 0, %12 ]
  %19 = icmp ugt i32 %18, 999
  br i1 %19, label %20, label %22

20:                                               ; preds = %17
  %21 = tail call i32 @sched_yield() #4
  br label %23

22:                                               ; preds = %17
  tail call void asm sideeffect "yield", ""() #5, !srcloc !8
  br label %23

23:                                               ; preds = %20, %22
  %24 = add i32 %18, 1
  %25 = load atomic i32, ptr %5 acquire, align 64
  %26 = icmp eq i32 %25, %6
  br i1 %26, label %17, label %27, !llvm.loop !9

27:                                               ; preds = %23, %12, %15, %1
  ret void
}

; Function Attrs: nounwind
define void @qc_wake(ptr noundef %0) local_unnamed_addr #0 {
  %2 = load i32, ptr %0, align 64, !tbaa !3
  %3 = icmp slt i32 %2, 2
  br i1 %3, label %25, label %4

4:                                                ; preds = %1
  %5 = getelementptr inbounds i8, ptr %0, i64 64
  %6 = atomicrmw add ptr %5, i32 1 seq_cst, align 64
  %7 = load i32, ptr %0, align 64, !tbaa !3
  %8 = icmp sgt i32 %7, 1
  br i1 %8, label %9, label %25

9:                                                ; preds = %4
  %10 = getelementptr inbounds i8, ptr %0, i64 256
  br label %11

11:                                               ; preds = %9, %19
  %12 = phi i64 [ 0, %9 ], [ %20, %19 ]
  %13 = getelementptr inbounds [15 x %struct.worker], ptr %10, i64 0, i64 %12
  %14 = getelementptr inbounds i8, ptr %13, i64 84
  %15 = atomicrmw xchg ptr %14, i32 0 seq_cst, align 4
  %16 = icmp eq i32 %15, 0
  br i1 %16, label %19, label %17

17:                                               ; preds = %11
  %18 = tail call i32 @sem_post(ptr noundef nonnull %13) #4
  br label %19

19:                                               ; preds = %11, %17
  %20 = add nuw nsw i64 %12, 1
  %21 = load i32, ptr %0, align 64, !tbaa !3
  %22 = add nsw i32 %21, -1
  %23 = sext i32 %22 to i64
  %24 = icmp slt i64 %20, %23
  br i1 %24, label %11, label %25, !llvm.loop !11

25:                                               ; preds = %19, %4, %1
  ret void
}

declare extern_weak i32 @sem_post(ptr noundef) #1

; Function Attrs: nounwind
define void @qc_compute(ptr noundef %0) local_unnamed_addr #0 {
  %2 = load i32, ptr %0, align 64, !tbaa !3
  %3 = tail call i32 @llvm.smax.i32(i32 %2, i32 1)
  tail call void @qc_part(ptr noundef nonnull %0, i32 noundef 0, i32 noundef %3) #4
  ret void
}

declare void @qc_part(ptr noundef, i32 noundef, i32 noundef) local_unnamed_addr #1

; Function Attrs: nounwind
define void @qc_stop(ptr noundef %0) local_unnamed_addr #0 {
  %2 = getelementptr inbounds i8, ptr %0, i64 4
  store i32 1, ptr %2, align 4, !tbaa !12
  %3 = load i32, ptr %0, align 64, !tbaa !3
  %4 = icmp slt i32 %3, 2
  br i1 %4, label %30, label %5

5:                                                ; preds = %1
  %6 = getelementptr inbounds i8, ptr %0, i64 64
  %7 = atomicrmw add ptr %6, i32 1 seq_cst, align 64
  %8 = load i32, ptr %0, align 64, !tbaa !3
  %9 = icmp sgt i32 %8, 1
  br i1 %9, label %10, label %30

10:                                               ; preds = %5
  %11 = getelementptr inbounds i8, ptr %0, i64 256
  br label %12

12:                                               ; preds = %20, %10
  %13 = phi i64 [ 0, %10 ], [ %21, %20 ]
  %14 = getelementptr inbounds [15 x %struct.worker], ptr %11, i64 0, i64 %13
  %15 = getelementptr inbounds i8, ptr %14, i64 84
  %16 = atomicrmw xchg ptr %15, i32 0 seq_cst, align 4
  %17 = icmp eq i32 %16, 0
  br i1 %17, label %20, label %18

18:                                               ; preds = %12
  %19 = tail call i32 @sem_post(ptr noundef nonnull %14) #4
  br label %20

20:                                               ; preds = %18, %12
  %21 = add nuw nsw i64 %13, 1
  %22 = load i32, ptr %0, align 64, !tbaa !3
  %23 = add nsw i32 %22, -1
  %24 = sext i32 %23 to i64
  %25 = icmp slt i64 %21, %24
  br i1 %25, label %12, label %26, !llvm.loop !11

26:                                               ; preds = %20
  %27 = icmp sgt i32 %22, 1
  br i1 %27, label %28, label %30

28:                                               ; preds = %26
  %29 = getelementptr inbounds i8, ptr %0, i64 256
  br label %31

30:                                               ; preds = %31, %5, %1, %26
  store i32 0, ptr %0, align 64, !tbaa !3
  ret void

31:                                               ; preds = %28, %31
  %32 = phi i64 [ 0, %28 ], [ %38, %31 ]
  %33 = getelementptr inbounds [15 x %struct.worker], ptr %29, i64 0, i64 %32
  %34 = getelementptr inbounds i8, ptr %33, i64 64
  %35 = load i64, ptr %34, align 64, !tbaa !13
  %36 = tail call i32 @pthread_join(i64 noundef %35, ptr noundef null) #4
  %37 = tail call i32 @sem_destroy(ptr noundef nonnull %33) #4
  %38 = add nuw nsw i64 %32, 1
  %39 = load i32, ptr %0, align 64, !tbaa !3
  %40 = add nsw i32 %39, -1
  %41 = sext i32 %40 to i64
  %42 = icmp slt i64 %38, %41
  br i1 %42, label %31, label %30, !llvm.loop !17
}

declare extern_weak i32 @pthread_join(i64 noundef, ptr noundef) #1

declare extern_weak i32 @sem_destroy(ptr noundef) #1

; Function Attrs: nounwind
define i32 @qc_start(ptr noundef %0, i32 noundef %1) local_unnamed_addr #0 {
  tail call void @llvm.memset.p0.i64(ptr noundef nonnull align 64 dereferenceable(2176) %0, i8 0, i64 2176, i1 false)
  %3 = add i32 %1, -17
  %4 = icmp ult i32 %3, -16
  br i1 %4, label %83, label %5

5:                                                ; preds = %2
  %6 = icmp ugt i32 %1, 1
  br i1 %6, label %7, label %21

7:                                                ; preds = %5
  %8 = icmp ne ptr @pthread_create, null
  %9 = icmp ne ptr @pthread_join, null
  %10 = and i1 %8, %9
  %11 = icmp ne ptr @sched_yield, null
  %12 = and i1 %11, %10
  %13 = icmp ne ptr @sem_init, null
  %14 = and i1 %13, %12
  %15 = icmp ne ptr @sem_wait, null
  %16 = and i1 %15, %14
  %17 = icmp ne ptr @sem_post, null
  %18 = and i1 %17, %16
  %19 = icmp ne ptr @sem_destroy, null
  %20 = and i1 %19, %18
  br i1 %20, label %21, label %83

21:                                               ; preds = %7, %5
  %22 = getelementptr inbounds i8, ptr %0, i64 256
  %23 = add nsw i32 %1, -1
  %24 = zext nneg i32 %23 to i64
  br label %25

25:                                               ; preds = %36, %21
  %26 = phi i64 [ %31, %36 ], [ 0, %21 ]
  %27 = icmp eq i64 %26, %24
  br i1 %27, label %80, label %28

28:                                               ; preds = %25
  %29 = getelementptr inbounds [15 x %struct.worker], ptr %22, i64 0, i64 %26
  %30 = getelementptr inbounds i8, ptr %29, i64 72
  store ptr %0, ptr %30, align 8, !tbaa !18
  %31 = add nuw nsw i64 %26, 1
  %32 = getelementptr inbounds i8, ptr %29, i64 80
  %33 = trunc nuw i64 %31 to i32
  store i32 %33, ptr %32, align 16, !tbaa !19
  %34 = tail call i32 @sem_init(ptr noundef nonnull %29, i32 noundef 0, i32 noundef 0) #4
  %35 = icmp eq i32 %34, 0
  br i1 %35, label %36, label %42

36:                                               ; preds = %28
  %37 = getelementptr inbounds i8, ptr %29, i64 64
  %38 = tail call i32 @pthread_create(ptr noundef nonnull %37, ptr noundef null, ptr noundef nonnull @work, ptr noundef nonnull %29) #4
  %39 = icmp eq i32 %38, 0
  br i1 %39, label %25, label %40

40:                                               ; preds = %36
  %41 = tail call i32 @sem_destroy(ptr noundef nonnull %29) #4
  br label %42

42:                                               ; preds = %28, %40
  %43 = phi i32 [ %38, %40 ], [ 38, %28 ]
  store i32 %33, ptr %0, align 64, !tbaa !3
  %44 = getelementptr inbounds i8, ptr %0, i64 4
  store i32 1, ptr %44, align 4, !tbaa !12
  %45 = and i64 %26, 4294967295
  %46 = icmp eq i64 %45, 0
  br i1 %46, label %80, label %47

47:                                               ; preds = %42
  %48 = getelementptr inbounds i8, ptr %0, i64 64
  %49 = atomicrmw add ptr %48, i32 1 seq_cst, align 64
  %50 = load i32, ptr %0, align 64, !tbaa !3
  %51 = icmp sgt i32 %50, 1
  br i1 %51, label %52, label %80

52:                                               ; preds = %47, %60
  %53 = phi i64 [ %61, %60 ], [ 0, %47 ]
  %54 = getelementptr inbounds [15 x %struct.worker], ptr %22, i64 0, i64 %53
  %55 = getelementptr inbounds i8, ptr %54, i64 84
  %56 = atomicrmw xchg ptr %55, i32 0 seq_cst, align 4
  %57 = icmp eq i32 %56, 0
  br i1 %57, label %60, label %58

58:                                               ; preds = %52
  %59 = tail call i32 @sem_post(ptr noundef nonnull %54) #4
  br label %60

60:                                               ; preds = %58, %52
  %61 = add nuw nsw i64 %53, 1
  %62 = load i32, ptr %0, align 64, !tbaa !3
  %63 = add nsw i32 %62, -1
  %64 = sext i32 %63 to i64
  %65 = icmp slt i64 %61, %64
  br i1 %65, label %52, label %66, !llvm.loop !11

66:                                               ; preds = %60
  %67 = icmp sgt i32 %62, 1
  br i1 %67, label %68, label %80

68:                                               ; preds = %66, %68
  %69 = phi i64 [ %75, %68 ], [ 0, %66 ]
  %70 = getelementptr inbounds [15 x %struct.worker], ptr %22, i64 0, i64 %69
  %71 = getelementptr inbounds i8, ptr %70, i64 64
  %72 = load i64, ptr %71, align 64, !tbaa !13
  %73 = tail call i32 @pthread_join(i64 noundef %72, ptr noundef null) #4
  %74 = tail call i32 @sem_destroy(ptr noundef nonnull %70) #4
  %75 = add nuw nsw i64 %69, 1
  %76 = load i32, ptr %0, align 64, !tbaa !3
  %77 = add nsw i32 %76, -1
  %78 = sext i32 %77 to i64
  %79 = icmp slt i64 %75, %78
  br i1 %79, label %68, label %80, !llvm.loop !17

80:                                               ; preds = %25, %68, %66, %47, %42
  %81 = phi i32 [ 0, %42 ], [ 0, %47 ], [ 0, %66 ], [ 0, %68 ], [ %1, %25 ]
  %82 = phi i32 [ %43, %42 ], [ %43, %47 ], [ %43, %66 ], [ %43, %68 ], [ 0, %25 ]
  store i32 %81, ptr %0, align 64, !tbaa !3
  br label %83

83:                                               ; preds = %80, %7, %2
  %84 = phi i32 [ 22, %2 ], [ 38, %7 ], [ %82, %80 ]
  ret i32 %84
}

; Function Attrs: mustprogress nocallback nofree nounwind willreturn memory(argmem: write)
declare void @llvm.memset.p0.i64(ptr nocapture writeonly, i8, i64, i1 immarg) #2

declare extern_weak i32 @pthread_create(ptr noundef, ptr noundef, ptr noundef, ptr noundef) #1

declare extern_weak i32 @sched_yield() #1

declare extern_weak i32 @sem_init(ptr noundef, i32 noundef, i32 noundef) #1

declare extern_weak i32 @sem_wait(ptr noundef) #1

; Function Attrs: nounwind
define internal noundef ptr @work(ptr noundef %0) #0 {
  %2 = getelementptr inbounds i8, ptr %0, i64 72
  %3 = load ptr, ptr %2, align 8, !tbaa !18
  %4 = getelementptr inbounds i8, ptr %0, i64 84
  %5 = getelementptr inbounds i8, ptr %3, i64 4
  %6 = getelementptr inbounds i8, ptr %0, i64 80
  br label %7

7:                                                ; preds = %35, %1
  %8 = phi ptr [ %3, %1 ], [ %38, %35 ]
  %9 = phi i32 [ 0, %1 ], [ %31, %35 ]
  %10 = getelementptr inbounds i8, ptr %8, i64 64
  br label %11

11:                                               ; preds = %15, %7
  %12 = phi i32 [ 0, %7 ], [ %16, %15 ]
  %13 = load atomic i32, ptr %10 acquire, align 4
  %14 = icmp eq i32 %13, %9
  br i1 %14, label %15, label %30

15:                                               ; preds = %11
  tail call void asm sideeffect "yield", ""() #5, !srcloc !8
  %16 = add nuw nsw i32 %12, 1
  %17 = icmp eq i32 %16, 1000
  br i1 %17, label %18, label %11, !llvm.loop !20

18:                                               ; preds = %15
  store atomic i32 1, ptr %4 seq_cst, align 4
  %19 = load atomic i32, ptr %10 seq_cst, align 4
  %20 = icmp eq i32 %19, %9
  br i1 %20, label %24, label %21

21:                                               ; preds = %18
  %22 = atomicrmw xchg ptr %4, i32 0 seq_cst, align 4
  %23 = icmp eq i32 %22, 0
  br i1 %23, label %24, label %28

24:                                               ; preds = %21, %18
  br label %25

25:                                               ; preds = %24, %25
  %26 = tail call i32 @sem_wait(ptr noundef %0) #4
  %27 = icmp eq i32 %26, 0
  br i1 %27, label %28, label %25, !llvm.loop !21

28:                                               ; preds = %25, %21
  %29 = load atomic i32, ptr %10 acquire, align 4
  br label %30

30:                                               ; preds = %11, %28
  %31 = phi i32 [ %29, %28 ], [ %13, %11 ]
  %32 = load i32, ptr %5, align 4, !tbaa !12
  %33 = icmp eq i32 %32, 0
  br i1 %33, label %35, label %34

34:                                               ; preds = %30
  ret ptr null

35:                                               ; preds = %30
  %36 = load i32, ptr %6, align 16, !tbaa !19
  %37 = load i32, ptr %3, align 64, !tbaa !3
  tail call void @qc_part(ptr noundef nonnull %3, i32 noundef %36, i32 noundef %37) #4
  %38 = load ptr, ptr %2, align 8, !tbaa !18
  br label %7
}

; Function Attrs: nocallback nofree nosync nounwind speculatable willreturn memory(none)
declare i32 @llvm.smax.i32(i32, i32) #3

attributes #0 = { nounwind "frame-pointer"="non-leaf" "no-builtins" "no-trapping-math"="true" "stack-protector-buffer-size"="8" "target-cpu"="generic" "target-features"="+fp-armv8,+neon,+reserve-x18,+v8a,-fmv,-outline-atomics" }
attributes #1 = { "frame-pointer"="non-leaf" "no-builtins" "no-trapping-math"="true" "stack-protector-buffer-size"="8" "target-cpu"="generic" "target-features"="+fp-armv8,+neon,+reserve-x18,+v8a,-fmv,-outline-atomics" }
attributes #2 = { mustprogress nocallback nofree nounwind willreturn memory(argmem: write) }
attributes #3 = { nocallback nofree nosync nounwind speculatable willreturn memory(none) }
attributes #4 = { nobuiltin nounwind "no-builtins" }
attributes #5 = { nounwind }

!llvm.module.flags = !{!0, !1, !2}

!0 = !{i32 1, !"wchar_size", i32 4}
!1 = !{i32 8, !"PIC Level", i32 2}
!2 = !{i32 7, !"frame-pointer", i32 1}
!3 = !{!4, !5, i64 0}
!4 = !{!"pool", !5, i64 0, !5, i64 4, !5, i64 64, !5, i64 128, !5, i64 192, !6, i64 256}
!5 = !{!"int", !6, i64 0}
!6 = !{!"omnipotent char", !7, i64 0}
!7 = !{!"Simple C/C++ TBAA"}
!8 = !{i64 1854}
!9 = distinct !{!9, !10}
!10 = !{!"llvm.loop.mustprogress"}
!11 = distinct !{!11, !10}
!12 = !{!4, !5, i64 4}
!13 = !{!14, !15, i64 64}
!14 = !{!"worker", !6, i64 0, !15, i64 64, !16, i64 72, !5, i64 80, !5, i64 84}
!15 = !{!"long", !6, i64 0}
!16 = !{!"any pointer", !6, i64 0}
!17 = distinct !{!17, !10}
!18 = !{!14, !16, i64 72}
!19 = !{!14, !5, i64 80}
!20 = distinct !{!20, !10}
!21 = distinct !{!21, !10}
